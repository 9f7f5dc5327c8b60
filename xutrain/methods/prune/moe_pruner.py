"""MoE-Pruner (arXiv:2410.12013, eq. 9 and Algorithm 1): Wanda's score with every token multiplied by its router weight.

    S_ij = |W_ij| sqrt( sum_{t routed to e} g_t^2 z_tj^2 ),   z = x for W1 and W3, z = h = silu(W1 x) * (W3 x) for W2

compared inside each output row; no weight update. The printed Gate_j has no input index: it is read as g_t, the
renormalised top-k weight.

Limits: equal g for all tokens of an expert is Wanda (so is k = 1 with renormalisation, and ``gate: none``); scaling g by a
constant per expert changes no mask, so rarely used experts are not pruned harder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.prune.base import Expert, Routing, Tokens, WeightMethod
from xutrain.methods.prune.moments import Moments
from xutrain.methods.prune.wanda import input_norm_scores
from xutrain.registry import method

Gate = Literal["topk", "none", "prob", "sqrt", "square", "all_tokens"]
GATE_FIELD: Any = Field(
    "topk",
    description="router weight of a token: topk as the model applies it; none: 1 (Wanda); prob: softmax over all experts; "
    "sqrt, square: of topk; all_tokens: every token with its softmax probability",
)


def gated_tokens(routing: Routing, expert: int, gate: Gate) -> Tokens:
    """The tokens of ``expert`` and their weight g under one reading of the formula."""
    if gate == "all_tokens":
        return Tokens(torch.arange(len(routing.prob), device=routing.prob.device), routing.prob[:, expert])
    index, weight = routing.routed(expert)
    if gate == "none":
        weight = torch.ones_like(weight)
    elif gate == "prob":
        weight = routing.prob[index, expert]
    elif gate == "sqrt":
        weight = weight.sqrt()
    elif gate == "square":
        weight = weight.square()
    return Tokens(index, weight)


@method("prune", "moe_pruner", paper="2410.12013", summary="weight times router-weighted input norm, inside each row")
class MoEPruner(WeightMethod):
    class Options(WeightMethod.Options):
        gate: Gate = GATE_FIELD

    statistics = Moments

    def tokens(self, routing: Routing, expert: int) -> Tokens:
        return gated_tokens(routing, expert, self.options.gate)  # type: ignore[attr-defined]

    def scores(self, expert: Expert, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return input_norm_scores(expert, sums)
