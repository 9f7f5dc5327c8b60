"""Random: in every row a uniformly random subset of the right size. The floor that every score must beat.

    S_ij uniform on [0, 1), independent;    the floor(d_in p) smallest of each row go, or n:m

p is the sparsity; the draw is keyed by the run's seed, layer, expert and matrix, and looks at no data.

Limits: sparsity 0 changes nothing, sparsity 1 leaves zeros; the same seed draws the same masks.
"""

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
