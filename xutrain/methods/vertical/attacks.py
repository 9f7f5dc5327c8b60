"""What the protocol's own output gives away, shown by doing it: the totals attack and the label sign.

Totals attack: whoever asks for sums gets z_i of every sample at every full pass, legitimately. Less its own part, T passes are
O = X_others W, an n x T matrix. Once T reaches the number d of the others' columns, a rank-d factorisation gives X_others up to an
invertible d x d matrix, which the features of d known customers (and a few more, for noise) fix. Masks do not help: only totals are used.
A softmax total is a number per class, all but one of them free (the weights of all classes add up to zero), so that fewer passes do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xutrain.methods.vertical.losses import Array


def totals_attack(observed: Array, truth: Array, known: NDArray[np.int64]) -> float:
    """Relative error ||found - truth|| / ||truth|| over the unknown rows; predicting zero gives about 1.

    Args:
        observed: (n, T) totals less the attacker's own part. truth: (n, d) the others' features. known: rows the attacker knows.
    """
    left, sizes, _ = np.linalg.svd(observed, full_matrices=False)
    rank = min(truth.shape[1], int((sizes > sizes[0] * 1e-13).sum()))
    factors = left[:, :rank]
    mixing = np.linalg.lstsq(factors[known], truth[known], rcond=None)[0]
    unknown = np.setdiff1d(np.arange(len(truth)), known)
    return float(np.linalg.norm(factors[unknown] @ mixing - truth[unknown]) / np.linalg.norm(truth[unknown]))


def observed_totals(recipe: Any, data: Any, attacker: int, passes: int) -> Array:
    """Totals less the attacker's part after each epoch of the recipe's training in lock step: (n, passes, 1 or classes)."""
    from xutrain.methods.vertical.plan import Plan, methods_of

    plan = Plan.of(recipe, data)
    methods = methods_of(recipe, data, plan, list(range(plan.q)), [recipe.train.lr] * plan.q)
    writing = [m for p, m in methods.items() if plan.backward or p in plan.active]
    columns = []
    for k in range(passes * plan.epoch):
        if plan.table and (k == 0 or (plan.passes != "none" and k % plan.inner == 0)):
            full = methods[plan.leader].signal(np.asarray(sum(m.contribution() for m in methods.values())), data.y)
            for m in writing:
                m.refer(full)
        rows = plan.rows(plan.leader, k)
        total = sum(m.contribution(rows) for m in methods.values())
        signal = methods[plan.leader].signal(np.asarray(total), data.y[rows])
        for m in writing:
            m.apply(rows, signal)
        if (k + 1) % plan.epoch == 0:
            columns.append(sum(m.contribution() for p, m in methods.items() if p != attacker))
    return np.stack([np.asarray(c).reshape(plan.n, -1) for c in columns], axis=1)


def labels_from_signals(signals: Array) -> Array:
    """The labels that a collaborator reads off logistic signals: theta < 0 if and only if y = +1."""
    return np.where(signals < 0, 1.0, -1.0)
