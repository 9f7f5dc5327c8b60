"""Wanda (arXiv:2306.11695): S_ij = |W_ij| ||X_j||_2, compared inside each output row, no weight update.

    S_ij = |W_ij| sqrt( sum_t z_tj^2 ),   z = x for W1 and W3, z = h = silu(W1 x) * (W3 x) for W2

For an expert, X are the tokens that the router sends to it. ``all_tokens`` calibrates every expert with every token, as
some tools do by default. Equal router weights turn MoE-Pruner into this method, bit for bit.

Limits: it is MoE-Pruner with equal g; where all columns of X have one norm it is magnitude inside rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.prune.base import Expert, Routing, Tokens, WeightMethod
from xutrain.methods.prune.moments import Moments
from xutrain.registry import method


def input_norm_scores(expert: Expert, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S_ij = |W_ij| sqrt(s_j): s from x for gate and up, from h for down. Shapes as the weights."""
    x, h = sums["x"].sqrt(), sums["h"].sqrt()
    return {"gate": (expert.gate * x).abs_(), "up": (expert.up * x).abs_(), "down": (expert.down * h).abs_()}


@method("prune", "wanda", paper="2306.11695", summary="weight times input norm, inside each row")
class Wanda(WeightMethod):
    class Options(WeightMethod.Options):
        all_tokens: bool = Field(False, description="calibrate every expert with every token, not with those routed to it")

    statistics = Moments

    def tokens(self, routing: Routing, expert: int) -> Tokens:
        if not self.options.all_tokens:  # type: ignore[attr-defined]
            return super().tokens(routing, expert)
        total = len(routing.prob)
        return Tokens(torch.arange(total, device=routing.prob.device), routing.prob.new_ones(total))

    def scores(self, expert: Expert, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return input_norm_scores(expert, sums)
