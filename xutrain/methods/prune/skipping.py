"""NAEE's dynamic skipping (arXiv:2402.14800): at inference, drop the second expert of a token where its weight is small.

    beta = median over calibration tokens of w_2 / w_1;   a token with w_2 < beta w_1 goes to its first expert alone

with the whole of its routing weight. For models that route to two experts. Limits: beta 0 skips nothing, beta > 1 is top-1.
"""

from __future__ import annotations

import torch

from xutrain.errors import Issue, RecipeError
from xutrain.methods.prune.base import Routing


def _two(routing: Routing) -> None:
    if (k := routing.weight.shape[1]) != 2:
        raise RecipeError(Issue("evaluation.skipping", f"is for models with two experts a token; this one has {k}", has_value=False))


def median_ratio(routing: Routing) -> float:
    """beta of one layer."""
    _two(routing)
    first, second = routing.weight.sort(1, descending=True).values.unbind(1)
    return float((second / first).median())


def skipped(routing: Routing, beta: float) -> Routing:
    """The decision with second experts dropped: their weight is zero, the first has the sum of both."""
    _two(routing)
    order = routing.weight.argsort(dim=1, descending=True, stable=True)
    weight, index = routing.weight.gather(1, order), routing.index.gather(1, order)
    drop = weight[:, 1] < beta * weight[:, 0]
    alone = torch.stack([weight.sum(1), torch.zeros_like(weight[:, 1])], 1)
    return Routing(torch.where(drop.unsqueeze(1) & torch.tensor([False, True]).to(index.device), -1, index),
                   torch.where(drop.unsqueeze(1), alone, weight), routing.prob)  # fmt: skip
