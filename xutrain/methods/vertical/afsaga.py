"""AFSAGA-VP: block steps with a table of past signals (arXiv 2008.06233; docs/vertical.md).

    scalar     w_l <- w_l - lr [ (t - a_i) x_{i,l} + A_l + l2 w_l ],    A_l <- A_l + (t - a_i) x_{i,l} / n,    a_i <- t
    official   w_l <- w_l - lr (g - T_i + mean T),    mean T <- mean T + (g - T_i) / n,    T_i <- g,    g = t x_{i,l} + l2 w_l

with t = theta(z_i, y_i). ``table: scalar`` keeps the n past thetas a_i, for in a linear model they say everything about a past
gradient. ``table: official`` is the authors' program: past block gradients g, regulariser inside, n x d_l numbers. Every party
has its own table, since every party saw its own total. A sample that is twice in a mini-batch changes the table once.

Limits: all parties in lock step with one index stream are centralised SAGA with the same table; at the optimum, the table taken
there, every step is zero.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from xutrain.methods.vertical.base import Rows, VerticalMethod
from xutrain.methods.vertical.losses import Array
from xutrain.registry import Named, method


@method("vertical", "afsaga", paper="2008.06233", summary="asynchronous SAGA on feature blocks", aliases=("saga", "afsaga_vp", "fsaga_vp"))
class AFSAGA(VerticalMethod):
    """Converges linearly with a constant step, without full passes."""

    class Options(Named):
        table: Literal["scalar", "official"] = Field(
            "scalar", description="Remember thetas (n numbers) or whole block gradients (n times d)."
        )

    def __init__(self, options: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(options, *args, **kwargs)
        self.whole = getattr(options, "table", "scalar") == "official"
        self.table: Array = np.zeros((self.n, *(self.weights.shape if self.whole else self.weights.shape[1:])))
        self.average: Array = np.zeros_like(self.weights)

    @staticmethod
    def starts_with_table(options: Any) -> bool:
        return True

    def refer(self, signal: Array) -> None:
        self.average = self.full_gradient(signal)
        self.table = np.array(_outer(_dense(self.features), signal) if self.whole else signal)

    def apply(self, rows: Rows, signal: Array) -> None:
        first = np.unique(rows, return_index=True)[1] if len(rows) > 1 else slice(None)
        if self.whole:
            past = self.table[rows]
            now = _outer(_dense(self.features[rows]), signal) + self.l2 * self.weights
            self.weights -= self.lr * ((now - past).mean(axis=0) + self.average)
            self.average += (now - past)[first].sum(axis=0) / self.n
            self.table[rows[first]] = now[first]
            return
        change = signal - self.table[rows]
        step = self.gradient(rows, change) + self.average
        self.weights *= 1.0 - self.lr * self.l2
        self.weights -= self.lr * step
        self.average += self.gradient(rows[first], change[first]) * (len(rows[first]) / self.n)
        self.table[rows[first]] = signal[first]

    def state(self) -> dict[str, Array]:
        return {"weights": self.weights, "table": self.table, "average": self.average}


def _dense(x: Any) -> Array:
    return np.asarray(x.todense()) if sparse.issparse(x) else x


def _outer(x: Array, signal: Array) -> Array:
    """signal_i x_i for each row: (b, d) or (b, d, classes)."""
    return x[:, :, None] * signal[:, None, :] if signal.ndim == 2 else x * signal[:, None]
