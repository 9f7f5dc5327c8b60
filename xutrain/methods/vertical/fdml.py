"""FDML: an ensemble of the parties' own softmax models, trained together (baseline of the journal version of the paper).

    p_l = softmax(x_{i,l}.w_l),    p = (1/q) sum_l p_l
    w_l <- w_l - lr [ c (p_l - onehot(y)) x_{i,l} + l2 w_l ],    c = p_l(y) / (q p(y))   (exact),    q p_l(y) / p(y)   (official)

Party l predicts from its block alone; one all-reduce a step sums the p_l. ``factor: exact`` is the chain rule for -log p(y).
The authors' program multiplies by the other factor (``factor: official``), q^2 times as long. Decay comes first.

Limits: with one party c = 1 in both forms, and the step is AFSGD-VP's with the softmax loss.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xutrain.methods.vertical.base import Features, Rows, VerticalMethod
from xutrain.methods.vertical.losses import Array, softmax
from xutrain.registry import Named, method

_TINY = 1e-300  # log and division of a probability that underflowed


@method("vertical", "fdml", paper="Hu et al. 2019", summary="ensemble of local softmax models, one all-reduce a step")
class FDML(VerticalMethod):
    """Lock step, labels everywhere, softmax only. What travels are predictions, not inner products."""

    class Options(Named):
        factor: Literal["exact", "official"] = Field("exact", description="The chain rule's factor, or the authors' program's.")

    exchange = "allreduce"
    lockstep = True

    def predict(self, features: Features) -> Array:
        """p_l of given rows, shape (m, classes)."""
        return softmax(super().predict(features))

    def signal(self, totals: Array, y: NDArray) -> Array:
        """Columns: the label, and p(y) of the ensemble. Each party turns them into its own gradient."""
        return np.stack([y.astype(np.float64), totals[np.arange(len(y)), y] / self.parties], axis=1)

    def apply(self, rows: Rows, signal: Array) -> None:
        y, joint = signal[:, 0].astype(np.int64), np.maximum(signal[:, 1], _TINY)
        own = self.contribution(rows)
        at = np.arange(len(rows))
        factor = own[at, y] / joint * (self.parties if self.official else 1.0 / self.parties)
        own[at, y] -= 1.0
        step = self.gradient(rows, own * factor[:, None])
        self.weights *= 1.0 - self.lr * self.l2
        self.weights -= self.lr * step

    @property
    def official(self) -> bool:
        return bool(self.options.factor == "official")

    def objective(self, totals: Array, y: NDArray) -> float:
        return float(-np.log(np.maximum(totals[np.arange(len(y)), y] / self.parties, _TINY)).mean())
