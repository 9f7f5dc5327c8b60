"""The centralised reference: all columns in one place, the same estimators, and the exact optimum by Newton's method.

    f(w) = (1/n) sum_i L(x_i.w, y_i) + (l2/2) ||w||^2,    w <- w - lr (v + l2 w)
    v = theta_i x_i   (sgd),    (theta_i - theta~_i) x_i + G   (svrg),    (theta_i - a_i) x_i + A   (saga)
    optimum: w <- w - s H^-1 grad f(w),    H = Hessian of f at w,    s halved until f does not rise

``central`` (called NonF in the papers) is AFSGD-VP, AFSVRG-VP or AFSAGA-VP with one party: nothing travels. ``optimum`` is what
all of them must converge to; it gives the objective gap that the runs report. Softmax has L-BFGS in Newton's place.

Limits: AFSGD-VP, AFSVRG-VP (barrier) and AFSAGA-VP (scalar table) in lock step with one index stream are this, and so is VFB2 with
one dominator and no delay.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from xutrain.methods.vertical.base import Features
from xutrain.methods.vertical.losses import Array, Loss, sigmoid
from xutrain.methods.vertical.vfb2 import Composed
from xutrain.registry import method


@method("vertical", "central", summary="all columns in one party: the centralised reference", aliases=("nonf",))
class Central(Composed):
    """One worker, pooled data."""

    class Options(Composed.Options):
        pass

    pooled = True


def optimum(features: Features, y: NDArray, loss: Loss, l2: float, outputs: int = 0) -> tuple[Array, float]:
    """Minimiser and minimum of the objective: damped Newton (logistic, ridge), L-BFGS (softmax).

    Args:
        features: (n, d). l2 must be positive for a unique answer. Meant for d up to some hundreds.
    Returns:
        weights (d,) or (d, outputs), and f*, exact to about 1e-14 for the first two losses and 1e-9 for softmax.
    """
    x = np.asarray(features.todense()) if isinstance(features, sparse.csr_matrix) else features
    n, d = x.shape
    if loss.name == "softmax":
        from scipy import optimize  # slow to import, and only needed here

        def both(flat: Array) -> tuple[float, Array]:
            w = flat.reshape(d, outputs)
            z = x @ w
            return loss.value(z, y) + 0.5 * l2 * float(flat @ flat), (x.T @ loss.theta(z, y) / n + l2 * w).ravel()

        found = optimize.minimize(
            both, np.zeros(d * outputs), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-8, "ftol": 1e-15}
        )
        return found.x.reshape(d, outputs), float(found.fun)

    def value(w: Array) -> float:
        return loss.value(x @ w, y) + 0.5 * l2 * float(w @ w)

    w = np.zeros(d)
    now = value(w)
    for _ in range(100):
        z = x @ w
        gradient = x.T @ loss.theta(z, y) / n + l2 * w
        bend = sigmoid(z) * sigmoid(-z) if loss.name == "logistic" else np.ones(n)
        hessian = (x.T * bend) @ x / n + l2 * np.eye(d)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while (then := value(w - size * step)) > now and size > 1e-8:
            size *= 0.5
        if then > now:
            break
        w, now = w - size * step, then
        if float(np.abs(gradient).max()) < 1e-15:
            break
    return w, now
