"""Magnitude: score |W|, no data. The baseline of Wanda's code: one threshold per matrix, inclusive.

    matrix   W_ij goes where |W_ij| <= the value at position int(numel p) (from 0) of all |W|, sorted
    row      the floor(d_in p) smallest |W_ij| of each row i go, of equal ones the first columns

p is the sparsity. ``group: row`` compares inside a row instead, as the activation-aware scores do.

Limits: with an n:m pattern both groups are the same; ``row`` is what the methods that need tokens do with an expert that too few
reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.prune.base import ROLES, Expert, WeightMethod
from xutrain.methods.prune.masks import Pattern, matrix_mask, row_mask
from xutrain.registry import Named, method


@method("prune", "magnitude", summary="drop the smallest weights of each matrix; looks at no data")
class Magnitude(WeightMethod):
    class Options(Named):
        group: Literal["matrix", "row"] = Field("matrix", description="compare inside a whole matrix, or inside each output row")

    def scores(self, expert: Expert, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: expert.matrix(role).abs() for role in ROLES}

    def linear_mask(self, weight: Tensor, sums: Tensor, pattern: Pattern, key: Key) -> Tensor:
        return self.mask(weight.abs(), pattern)

    def mask(self, score: Tensor, pattern: Pattern) -> Tensor:
        return (matrix_mask if self.options.group == "matrix" else row_mask)(score, pattern)  # type: ignore[attr-defined]
