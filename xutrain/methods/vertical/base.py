"""What a vertical method answers: what a party adds to a sum, what the label holder derives from it, what a party applies.

One object per party and run. It owns the party's features (n, d_l), its weights (d_l,) or (d_l, classes), and the memory of
its estimator; it never sees another party's features or weights. The loop moves indices, sums and signals between them.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from xutrain.methods.vertical.losses import Array, Loss
from xutrain.registry import Named

Features: TypeAlias = NDArray[np.float64] | sparse.csr_matrix
Rows: TypeAlias = NDArray[np.int64]


class VerticalMethod:
    """Base of the methods; SGD's answers by default.

    Args:
        options: the method's section of the recipe.
        features: this party's block, dense (n, d_l) or CSR.
        loss: logistic, ridge or softmax.
        lr: step size gamma of this party. l2: lambda of the objective. outputs: classes of softmax, else 0. parties: q.
    """

    class Options(Named):
        pass

    #: Who updates a party without labels: nobody ("none") or the label holder's signal ("dominator", VFB2).
    backward: ClassVar[str] = "none"
    #: "request": each label holder asks for its own sum. "allreduce": one sum a step, for everybody, unmasked.
    exchange: ClassVar[str] = "request"
    #: "pooled" methods see all columns in one party.
    pooled: ClassVar[bool] = False
    #: True for the methods that are defined in lock step only.
    lockstep: ClassVar[bool] = False

    def __init__(self, options: Any, features: Features, loss: Loss, *, lr: float, l2: float, outputs: int = 0, parties: int = 1) -> None:
        self.options, self.features, self.loss = options, features, loss
        self.lr, self.l2, self.parties = lr, l2, parties
        self.n, self.dim = features.shape
        self.weights: Array = np.zeros((self.dim, outputs) if outputs else self.dim)

    @staticmethod
    def passes(options: Any) -> str:
        """When reference totals over all samples are summed: "none", "barrier" or "rolling"."""
        return "none"

    @staticmethod
    def starts_with_table(options: Any) -> bool:
        """True when the estimator's memory starts at the reference point w = 0 (SVRG, SAGA)."""
        return False

    def contribution(self, rows: Rows | None = None) -> Array:
        """This party's summand for the training samples ``rows`` (all of them when None)."""
        return self.predict(self.features if rows is None else self.features[rows])

    def predict(self, features: Features) -> Array:
        """The summand of given rows of this party's columns: inner products x.w_l."""
        return np.asarray(features @ self.weights)

    def signal(self, totals: Array, y: NDArray) -> Array:
        """What a label holder derives from the totals: theta = dL/dz."""
        return self.loss.theta(totals, y)

    def apply(self, rows: Rows, signal: Array) -> None:
        """One update of this party's own weights from the signal of ``rows``."""
        raise NotImplementedError

    def refer(self, signal: Array) -> None:
        """Take the signal of all n samples at a reference point (SVRG's snapshot, SAGA's first table)."""
        raise NotImplementedError

    def objective(self, totals: Array, y: NDArray) -> float:
        """Mean loss of the joint prediction, without the regulariser."""
        return self.loss.value(totals, y)

    def gradient(self, rows: Rows, signal: Array) -> Array:
        """(1/b) sum over rows of signal_i x_{i,l}: the data part of the block gradient."""
        return np.asarray(self.features[rows].T @ signal) / len(rows)

    def full_gradient(self, signal: Array) -> Array:
        """The same over all n samples."""
        return np.asarray(self.features.T @ signal) / self.n

    def state(self) -> dict[str, Array]:
        """Everything that a resumed run needs."""
        return {"weights": self.weights}

    def load_state(self, state: dict[str, Array]) -> None:
        for name, value in state.items():
            setattr(self, name, np.array(value, dtype=np.float64))
