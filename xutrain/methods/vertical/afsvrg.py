"""AFSVRG-VP: variance-reduced block steps (arXiv 2008.06233; docs/vertical.md).

    G_l = (1/n) sum_i theta~_i x_{i,l},    theta~ = theta(z~, y)            at a snapshot; data part, no regulariser
    w_l <- w_l - lr [ (theta_i - theta~_i) x_{i,l} + G_l + l2 w_l ]         at every step

At a snapshot all parties sum the reference totals z~ of all n samples; party l keeps theta~ and G_l. ``snapshot: barrier`` is the
published form: everybody stops for the pass, so everybody waits for the slowest party. ``snapshot: rolling`` (ours) sums in the
background; each party changes over when it has the result, and each stays unbiased with respect to its own version. The first
reference point is w = 0, whose totals are known to be zero.

Limits: with ``barrier`` all parties in lock step with one index stream are centralised SVRG; at the optimum, the snapshot taken
there, every step is zero.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from xutrain.methods.vertical.base import Rows, VerticalMethod
from xutrain.methods.vertical.losses import Array
from xutrain.registry import Named, method


@method("vertical", "afsvrg", paper="2008.06233", summary="asynchronous SVRG on feature blocks", aliases=("svrg", "afsvrg_vp", "fsvrg_vp"))
class AFSVRG(VerticalMethod):
    """Converges linearly with a constant step."""

    class Options(Named):
        snapshot: Literal["barrier", "rolling"] = Field(
            "rolling", description="Stop everybody for a full pass (the paper), or sum in the background."
        )
        inner: int | None = Field(None, ge=1, description="Local steps between snapshots; by default one pass over the samples.")

    def __init__(self, options: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(options, *args, **kwargs)
        self.reference: Array = np.zeros((self.n, *self.weights.shape[1:]))
        self.average: Array = np.zeros_like(self.weights)

    @staticmethod
    def passes(options: Any) -> str:
        return str(getattr(options, "snapshot", "barrier"))

    @staticmethod
    def starts_with_table(options: Any) -> bool:
        return True

    def refer(self, signal: Array) -> None:
        self.reference = np.array(signal)
        self.average = self.full_gradient(signal)

    def apply(self, rows: Rows, signal: Array) -> None:
        step = self.gradient(rows, signal - self.reference[rows])
        step += self.average
        self.weights *= 1.0 - self.lr * self.l2
        self.weights -= self.lr * step

    def state(self) -> dict[str, Array]:
        return {"weights": self.weights, "reference": self.reference, "average": self.average}
