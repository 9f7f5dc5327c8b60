"""What is reported of a vertical run: objective and gap, ranking quality, and what each party could do alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xutrain.data.tabular import VerticalData
from xutrain.methods.vertical.base import VerticalMethod
from xutrain.methods.vertical.central import optimum
from xutrain.methods.vertical.losses import LOSSES, Array


def auc(scores: Array, y: NDArray) -> float:
    """Area under the ROC curve by ranks, ties counted half. y in {-1, +1}."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    values, first, count = np.unique(scores[order], return_index=True, return_counts=True)
    if len(values) < len(scores):
        middle = first + (count + 1) / 2.0
        ranks[order] = np.repeat(middle, count)
    positive = y > 0
    p, n = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - p * (p + 1) / 2.0) / (p * n)) if p and n else float("nan")


def ks(scores: Array, y: NDArray) -> float:
    """Kolmogorov-Smirnov distance between the scores of both classes."""
    order = np.argsort(scores, kind="stable")
    positive = y[order] > 0
    above = np.cumsum(positive) / max(1, positive.sum()) - np.cumsum(~positive) / max(1, (~positive).sum())
    last = np.append(np.diff(scores[order]) > 0, True)  # compare between distinct scores only
    return float(np.abs(above[last]).max())


def quality(task: str, totals: Array, y: NDArray) -> dict[str, float]:
    """Accuracy, AUC and KS (binary), accuracy (classes; ties are errors), RMSE (regression)."""
    if task == "binary":
        return {"accuracy": float((np.sign(totals) == y).mean()), "auc": auc(totals, y), "ks": ks(totals, y)}
    if task == "classes":
        best = totals.max(axis=1)
        unique = (totals == best[:, None]).sum(axis=1) == 1
        return {"accuracy": float(((totals.argmax(axis=1) == y) & unique).mean())}
    return {"rmse": float(np.sqrt(np.square(totals - y).mean()))}


def scores(
    method: VerticalMethod, data: VerticalData, totals: Array, held: Array | None, penalty: float, minimum: float | None
) -> dict[str, float]:
    """All metrics of one look: objective, train_*, test_* and auc (of the test rows where there are some), the gap to the optimum."""
    objective = method.objective(totals, data.y) + penalty
    found = {"objective": objective}
    if minimum is not None:
        found["gap"] = objective - minimum
    found.update({f"train_{k}": v for k, v in quality(data.task, totals, data.y).items()})
    if held is not None:
        found["test_loss"] = method.objective(held, data.y_test)
        found.update({f"test_{k}": v for k, v in quality(data.task, held, data.y_test).items()})
    if data.task == "binary":
        found["auc"] = found.get("test_auc", found["train_auc"])
    return found


class References:
    """The exact optimum of the joint problem, and of each party on its own columns: what the partnership is worth.

    Attributes:
        minimum: f*, or None where it was not asked for, or has too many columns, or is another objective (fdml).
        alone: auc_alone_<party> (on test rows where there are some), and objective_alone_<party>.
    """

    def __init__(self, recipe: Any, data: VerticalData) -> None:
        self.minimum: float | None = None
        self.alone: dict[str, float] = {}
        width = sum(len(p.columns) for p in data.parties)
        fits = width <= recipe.eval.max_dim and recipe.train.weight_decay > 0
        loss, l2 = LOSSES[recipe.loss](), recipe.train.weight_decay
        if recipe.eval.reference and fits and recipe.method.name != "fdml":
            self.minimum = optimum(data.pooled().parties[0].train, data.y, loss, l2, data.classes)[1]
        if recipe.eval.alone and fits and data.task == "binary":
            ones = [p for p in data.parties if p.columns and p.columns[-1] == "intercept"]
            for party in data.parties:
                train, test = (np.asarray(x.todense()) if hasattr(x, "todense") else x for x in (party.train, party.test))
                if ones and party is not ones[0]:  # everybody may have an intercept when alone
                    train, test = (np.hstack([x, np.ones((len(x), 1))]) for x in (train, test))
                w, f = optimum(train, data.y, loss, l2)
                self.alone[f"objective_alone_{party.name}"] = f
                self.alone[f"auc_alone_{party.name}"] = auc(test @ w, data.y_test) if len(data.y_test) else auc(train @ w, data.y)
