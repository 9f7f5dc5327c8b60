"""Random: in every row a uniformly random subset of the right size. The floor that every score must beat."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.prune.base import ROLES, Cut, Expert, WeightMethod
from xutrain.methods.prune.masks import Pattern, row_mask
from xutrain.registry import Named, method


@method("prune", "random", summary="drop random weights of each row; the floor")
class Random(WeightMethod):
    class Options(Named):
        pass

    def cut(self, expert: Expert, sums: Mapping[str, Tensor], pattern: Pattern, key: Key) -> Cut:
        return Cut({role: self.linear_mask(expert.matrix(role), expert.gate, pattern, key.fold(stream=role)) for role in ROLES})

    def linear_mask(self, weight: Tensor, sums: Tensor, pattern: Pattern, key: Key) -> Tensor:
        return row_mask(key.uniform(weight.numel()).view(weight.shape).to(weight.device), pattern)
