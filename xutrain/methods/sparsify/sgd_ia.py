"""SGD with iterate averaging, to which arXiv 2004.05298 ties its method.

    c = mean_k C(g^k + wd z);   m <- mu m + c;   y <- y - lr m,   gradients g^k at z
    xbar <- (1 - a) xbar + a y,   a = 1 / ratio;   z = (1 - coeff) xbar + coeff y

With coeff 1 (standard averaging) it is the expectation over masks of DEF with one worker and lambda 1; with coeff lambda that
of DEF with lambda. Measured first at xbar.

Limits: ratio 1 is SGD; with coeff 1, y is SGD for any ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.base import Setup
from xutrain.methods.sparsify.sgd import SGD
from xutrain.registry import Named, method


@method("sparsify", "sgd_ia", paper="2004.05298", summary="baseline: SGD with an exponential average of its iterates")
class SGDIA(SGD):
    """``y`` is the iterate; ``x`` the average."""

    class Options(Named):
        name: str = "sgd_ia"
        ratio: float = Field(64.0, ge=1, description="R: the average takes 1 / R of the new iterate.")
        coeff: float = Field(1.0, ge=0, le=1, description="Where the gradient is taken: 1 at the iterate, 0 at the average.")

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.y = self.x.clone()
        self.z = self.x.clone()

    def point(self, worker: int) -> Tensor:
        return self.z

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        self.optimizer.step(self.y, self.mean_gradient(grads, self.z, step), lr)
        self.x.lerp_(self.y, 1.0 / self.options.ratio)
        torch.lerp(self.x, self.y, self.options.coeff, out=self.z)

    def deploy(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        shared, workers = super().state()
        return {**shared, "y": self.y, "z": self.z}, workers

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.y, self.z = shared["y"].clone(), shared["z"].clone()
