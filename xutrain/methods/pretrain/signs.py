"""Global steps that move every coordinate by one fixed length: x_{t+1} = (1 - eta gamma lambda) x_t - eta gamma s, s in {-1, 0, 1}.

All of x_{t+1} follows from x_t, which every worker knows, and from s. So an owner of the global state need only send s:
one bit a coordinate instead of 32, without loss (``downlink: sign``, ours).

Randomised signs for |v| <= B (the theory's device; E s = v / B):
    random2    +1 with probability 1/2 + v / 2B, else -1
    random3    sign(v) with probability |v| / B, else 0
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from xutrain.engine.base_optimizers import decayed, shrink
from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.methods.base import Setup
from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions


class SignOptions(RoundOptions):
    """What every method with a sign step understands."""

    eta: float = Field(1.0, gt=0, le=1e6, description="global rate; a round moves every coordinate by eta times gamma")
    weight_decay: float = Field(0.1, ge=0, le=1e3, description="lambda: decay of the global step, beside that of the base optimizer")
    decay: Literal["all", "matrices"] = Field("all", description="what the global weight decay acts on (the official code: all)")
    sign: Literal["exact", "random2", "random3"] = Field(
        "exact", description="the sign itself, or an unbiased draw with two or three values"
    )
    bound: float | Literal["max"] = Field("max", description="random signs: B, a number, or the largest absolute value of each tensor")
    downlink: Literal["fp32", "sign"] = Field("fp32", description="what owners of the global state send back: parameters, or signs")

    @field_validator("bound")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("must be above 0, or max")
        return value


class SignSteps(LocalSteps):
    """Base of the sign methods. A method says which vector's sign is taken (``direction``)."""

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.ranges = decayed(setup.layout, options.decay)

    def direction(self, delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """The vector whose sign is the step; updates ``memory``."""
        raise NotImplementedError

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        self._move(x, self._signs(delta, memory, piece), gamma, piece)

    def step_pieces(self, means: list[Tensor], gamma: float, number: int) -> Tensor:
        if self.options.downlink == "fp32":
            return super().step_pieces(means, gamma, number)
        assert self.owners is not None
        held = zip(self.owners.hosted, means, self.memory, strict=True)
        pieces = [self._signs(mean, memory, Piece(start, stop, number)) for (start, stop), mean, memory in held]
        whole = self.owners.share_directions(pieces, "model", self.x, zeros=self.options.sign == "random3")
        moved = self.x.clone()
        self._move(moved, whole, gamma, Piece(0, self.x.numel(), number))
        return moved

    def round_down_bits(self) -> int:
        assert self.owners is not None
        return (
            super().round_down_bits()
            if self.options.downlink == "fp32"
            else self.owners.direction_bits(zeros=self.options.sign == "random3")
        )

    def _signs(self, delta: Tensor, memory: dict[str, Tensor], piece: Piece) -> Tensor:
        vector = self.direction(delta, memory)
        key = self.setup.ctx.key("sign", piece.round)
        return signs(vector, self.options.sign, self.options.bound, key, piece.start, self.setup.layout)

    def _move(self, x: Tensor, s: Tensor, gamma: float, piece: Piece) -> None:
        """Decay, then step."""
        o = self.options
        inside = [(max(a, piece.start) - piece.start, min(b, piece.stop) - piece.start) for a, b in self.ranges]
        shrink(x, [(a, b) for a, b in inside if b > a], 1 - o.eta * gamma * o.weight_decay)
        x.add_(s, alpha=-o.eta * gamma)


def signs(v: Tensor, kind: str, bound: float | str, key: Key, start: int = 0, layout: list[Slice] | None = None) -> Tensor:
    """Exact or randomised signs of ``v`` (shape (n,)), in v's dtype; zero where v is zero (random2: where B is zero).

    Args:
        bound: B, or "max" for the largest absolute value of each tensor of ``layout`` (of the vector without one).
        key, start: the draw; element i uses counter start + i, so a part of a vector draws what the whole would.
    """
    if kind == "exact":
        return torch.sign(v)
    if bound == "max":
        scale = torch.empty_like(v)
        for a, b in [(0, v.numel())] if layout is None else [(part.start, part.stop) for part in layout]:
            scale[a:b] = v[a:b].abs().max() if b > a else 0.0
    else:
        scale = torch.full_like(v, float(bound))
    share = torch.where(scale > 0, v / scale, torch.zeros_like(v)).clamp_(-1, 1)
    uniform = torch.from_numpy((key.bits(v.numel(), start) >> 8).astype("float32") * 2.0**-24).to(v.device, v.dtype)
    if kind == "random3":
        return torch.where(uniform < share.abs(), torch.sign(v), torch.zeros_like(v))
    drawn = torch.where(uniform < 0.5 + 0.5 * share, torch.ones_like(v), -torch.ones_like(v))
    return torch.where(scale > 0, drawn, torch.zeros_like(v))
