"""VFB2: backward updating (Zhang, Gu, Deng, Huang, AAAI 2021, arXiv 2103.00958), so that parties without labels learn too.

    sgd    w_j <- w_j - lr (theta_i x_{i,j} + l2 w_j)                               at every party j,    theta_i = theta(z_i, y_i)
    svrg   w_j <- w_j - lr [ (theta_i - theta~_i) x_{i,j} + G_j + l2 w_j ]
    saga   w_j <- w_j - lr [ (theta_i - a_i) x_{i,j} + A_j + l2 w_j ],              A_j and a_i as in AFSAGA-VP

In AFSGD-VP a party without labels cannot form theta, so its block stays at zero. Here the label holder (dominator) forms theta_i
and sends (i, theta_i) to all others (collaborators), who update their own current block. With ``estimator: svrg`` the dominator
sends the n reference thetas at each snapshot; with ``saga`` each party keeps its own table. Several label holders run as several
dominators side by side. The sign of a logistic theta is the label (theta < 0 iff y = +1): collaborators learn the labels of the
samples they are sent.

Limits: one dominator, no delay = centralised.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from xutrain.methods.vertical.afsaga import AFSAGA
from xutrain.methods.vertical.afsgd import AFSGD
from xutrain.methods.vertical.afsvrg import AFSVRG
from xutrain.methods.vertical.base import Rows, VerticalMethod
from xutrain.methods.vertical.losses import Array
from xutrain.registry import Named, method

ESTIMATORS: dict[str, type[VerticalMethod]] = {"sgd": AFSGD, "svrg": AFSVRG, "saga": AFSAGA}


class Composed(VerticalMethod):
    """A method that differs from an estimator in its control flow only: its arithmetic is the estimator's."""

    class Options(Named):
        estimator: Literal["sgd", "svrg", "saga"] = Field("sgd", description="Gradient estimator of the block steps.")
        snapshot: Literal["barrier", "rolling"] = Field("barrier", description="With svrg: stop for a full pass, or sum in the background.")
        inner: int | None = Field(None, ge=1, description="With svrg: steps between snapshots; by default one pass over the samples.")

    def __init__(self, options: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(options, *args, **kwargs)
        self.estimator = ESTIMATORS[options.estimator](options, *args, **kwargs)
        self.weights = self.estimator.weights

    @staticmethod
    def passes(options: Any) -> str:
        return str(options.snapshot) if options.estimator == "svrg" else "none"

    @staticmethod
    def starts_with_table(options: Any) -> bool:
        return bool(options.estimator != "sgd")

    def apply(self, rows: Rows, signal: Array) -> None:
        self.estimator.apply(rows, signal)

    def refer(self, signal: Array) -> None:
        self.estimator.refer(signal)

    def state(self) -> dict[str, Array]:
        return self.estimator.state()

    def load_state(self, state: dict[str, Array]) -> None:
        self.estimator.load_state(state)
        self.weights = self.estimator.weights


@method("vertical", "vfb2", paper="2103.00958", summary="backward updating: label holders send theta to the others")
class VFB2(Composed):
    """The default for real parties: one label holder, every block learns."""

    class Options(Composed.Options):
        pass

    backward = "dominator"
