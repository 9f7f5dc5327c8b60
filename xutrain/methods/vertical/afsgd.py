"""AFSGD-VP: asynchronous stochastic gradient steps on feature blocks (arXiv 2008.06233; docs/vertical.md).

    z_i = sum_l x_{i,l}.w_l,    v = theta(z_i, y_i) x_{i,l} + l2 w_l,    w_l <- w_l - lr v

The label holder l picks sample i, gets z_i, and writes its own block only; a mini-batch takes the mean over its samples.
Order of the arithmetic as in the authors' program: decay first, then the data part.

Limits: one party is centralised SGD; all parties in lock step with one index stream are centralised SGD.
"""

from __future__ import annotations

from xutrain.methods.vertical.base import Rows, VerticalMethod
from xutrain.methods.vertical.losses import Array
from xutrain.registry import Named, method


@method("vertical", "afsgd", paper="2008.06233", summary="asynchronous SGD on feature blocks", aliases=("sgd", "afsgd_vp", "fsgd_vp"))
class AFSGD(VerticalMethod):
    """Constant-step SGD: reaches a plateau whose height is proportional to the step."""

    class Options(Named):
        pass

    def apply(self, rows: Rows, signal: Array) -> None:
        step = self.gradient(rows, signal)
        self.weights *= 1.0 - self.lr * self.l2
        self.weights -= self.lr * step
