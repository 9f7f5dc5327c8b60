"""What a pruning method answers, and the data that it is given: one expert, its calibration tokens, a pattern.

A weight method says which calibration tokens of a layer count for an expert and with what weight, which statistics of
them it needs, and then turns weights and statistics into masks. The loop reads one expert, feeds its tokens in chunks,
asks for the masks, writes the expert back and forgets it; so no method ever sees more than one expert.

Legend (arXiv:2410.12013): x = input of the MoE block, a = W1 x, b = W3 x, h = silu(a) * b, E(x) = W2 h, g = router weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from xutrain.engine.rng import Key
from xutrain.methods.prune.masks import Pattern, keep, row_mask
from xutrain.registry import Named

#: The three matrices of a SwiGLU expert: W1 (inside silu), W3 and W2 of Mixtral.
ROLES = ("gate", "up", "down")
Role = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided for T tokens.

    index: int64 (T, k); weight: float32 (T, k), the factors that the model applies; prob: float32 (T, n), softmax over all experts.
    """

    index: Tensor
    weight: Tensor
    prob: Tensor

    def routed(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that reach ``expert`` in rising order, and the router weight of each: int64 (t,), float32 (t,)."""
        token, slot = (self.index == expert).nonzero(as_tuple=True)
        return token, self.weight[token, slot]


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens that count for one expert: rows of the layer's input, and their weight g >= 0."""

    index: Tensor
    weight: Tensor


@dataclass
class Expert:
    """The matrices of one expert in the compute dtype: gate and up (f, d), down (d, f)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def matrix(self, role: str) -> Tensor:
        return getattr(self, role)  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and h = silu(a) * b, each (t, f), for x (t, d)."""
        a, b = x @ self.gate.T, x @ self.up.T
        return a, b, F.silu(a) * b

    def __call__(self, x: Tensor) -> Tensor:
        """E(x), (t, d)."""
        return self.inner(x)[2] @ self.down.T


@dataclass(frozen=True)
class Chunk:
    """Some tokens inside one expert: x (t, d), g (t,), a, b and h (t, f)."""

    x: Tensor
    g: Tensor
    a: Tensor
    b: Tensor
    h: Tensor

    def input(self, role: str) -> Tensor:
        """The input of a matrix: h for down, x for the others."""
        return self.h if role == "down" else self.x


class Statistics:
    """Sums over an expert's tokens. ``add`` is called once a chunk; ``tokens`` and ``mass`` are counted by the loop."""

    def __init__(self, expert: Expert) -> None:
        self.expert = expert
        #: sums are float32 at least, also where the forward pass is bfloat16
        self.dtype = torch.promote_types(expert.gate.dtype, torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.expert.gate.device)

    def add(self, chunk: Chunk) -> None:
        """Add one chunk. The order of calls is the order of tokens."""

    def state(self) -> dict[str, Tensor]:
        """Vectors worth caching for another cut; empty when they are as large as the weights."""
        return {}


@dataclass
class Cut:
    """The outcome for one expert: masks, True = kept, and the new weights where a method changes kept ones."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)

    def applied(self, expert: Expert) -> Expert:
        """The pruned expert: changed weights where given, else the old ones, zero where dropped."""
        new = {r: keep(self.weights.get(r, expert.matrix(r)), m) for r, m in self.masks.items()}
        return Expert(*(new.get(r, expert.matrix(r)) for r in ROLES))


class WeightMethod:
    """A method that masks weights inside experts. Subclasses define ``scores`` or the whole of ``cut``."""

    class Options(Named):
        min_tokens: int = Field(1, ge=0, description="an expert with fewer calibration tokens falls back to per-row magnitude")

    kind: ClassVar[str] = "weights"
    #: Class of the sums that the method needs, or None when it looks at weights only.
    statistics: ClassVar[type[Statistics] | None] = None
    #: True when the sums do not fit beside the weights as vectors and cannot be cached.
    cacheable: ClassVar[bool] = True

    def __init__(self, options: Named) -> None:
        self.options = options

    @property
    def min_tokens(self) -> int:
        return int(getattr(self.options, "min_tokens", 1)) if self.statistics is not None else 0

    def tokens(self, routing: Routing, expert: int) -> Tokens:
        """Which tokens count for ``expert``: by default those routed to it, each with weight one."""
        index, weight = routing.routed(expert)
        return Tokens(index, torch.ones_like(weight))

    def scores(self, expert: Expert, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A score for every weight, higher is more important, per role."""
        raise NotImplementedError

    def mask(self, score: Tensor, pattern: Pattern) -> Tensor:
        return row_mask(score, pattern)

    def begin(self, expert: Expert) -> Statistics | None:
        return None if self.statistics is None else self.statistics(expert)

    def linear_mask(self, weight: Tensor, sums: Tensor, pattern: Pattern, key: Key) -> Tensor:
        """Mask of a matrix outside the experts, with no router weight: Wanda's score from s_j = sum_t z_tj^2 of its input."""
        return self.mask((weight * sums.sqrt()).abs_(), pattern)  # as wide as the sums: bfloat16 scores would tie

    def cut(self, expert: Expert, sums: Mapping[str, Tensor], pattern: Pattern, key: Key) -> Cut:
        """Masks (and changed weights) for one expert from its sums. ``key`` feeds the methods that draw at random."""
        return Cut({role: self.mask(score, pattern) for role, score in self.scores(expert, sums).items()})


def magnitude_cut(expert: Expert, pattern: Pattern) -> Cut:
    """Per-row magnitude: the fallback for an expert that too few tokens reached, whose scores would all be zero."""
    return Cut({role: row_mask(expert.matrix(role).abs(), pattern) for role in ROLES})
