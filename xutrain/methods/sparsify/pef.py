"""PEF: error feedback with the momentum after the reduction, PowerSGD's form (baseline of arXiv 2004.05298).

    e^k <- e^k + lr g^k;   c = mean_k C(e^k);   e^k <- e^k - C(e^k)
    u = c / lr + wd x;   m <- mu m + u;   x <- x - lr m

One momentum for all; weight decay is not compressed. With codec ``low_rank`` it is PowerSGD.

Limits: codec fp, or ratio 1, is SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.optim import FlatSGD
from xutrain.errors import Issue
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.codecs.base import Codec
from xutrain.methods.sparsify.soundness import no_feedback_over_shards, not_contractive
from xutrain.registry import Named, method


@method("sparsify", "pef", paper="2004.05298", summary="baseline: error feedback on gradients, momentum after the reduction")
class PEF(DataParallel):
    class Options(Named):
        name: str = "pef"

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.error = [torch.zeros_like(self.x) for _ in setup.workers.hosted]
        self.optimizer = FlatSGD(setup.optimizer)

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        return no_feedback_over_shards(recipe, codec)

    def notes(self) -> list[str]:
        return not_contractive(self.setup.exchange.codec)

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        for grad, error in zip(grads, self.error, strict=True):
            error.add_(grad, alpha=lr)
        held = [] if lr > 0 else [error.clone() for error in self.error]
        c = self.setup.exchange.feedback(self.error, self.setup.ctx.key("round", step)).mean
        for error, before in zip(self.error, held, strict=False):
            error.copy_(before)  # x does not move at lr 0, so what was sent is still owed
        self.optimizer.step(self.x, c.div_(lr) if lr > 0 else c.zero_(), lr)

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        return {"x": self.x, "optimizer": self.optimizer.state()}, {
            w: {"error": e} for w, e in zip(self.setup.workers.hosted, self.error, strict=True)
        }

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.optimizer.load_state(shared["optimizer"])
        self.error = [worker(w)["error"] for w in self.setup.workers.hosted]
