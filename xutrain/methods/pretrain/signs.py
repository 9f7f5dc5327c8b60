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
        (s,) = self._signs([self.direction(delta, memory)], [piece])
        self._move(x, s, gamma, piece)

    def step_pieces(self, means: list[Tensor], gamma: float, number: int) -> Tensor:
        assert self.owners is not None
        pieces = [Piece(start, stop, number) for start, stop in self.owners.hosted]
        drawn = self._signs([self.direction(mean, memory) for mean, memory in zip(means, self.memory, strict=True)], pieces)
        if self.options.downlink == "sign":
            whole = self.owners.share_directions(drawn, "model", self.x, zeros=self.options.sign == "random3")
            moved = self.x.clone()
            self._move(moved, whole, gamma, Piece(0, self.x.numel(), number))
            return moved
        parts = [self.x[piece.start : piece.stop].clone() for piece in pieces]
        for part, s, piece in zip(parts, drawn, pieces, strict=True):
            self._move(part, s, gamma, piece)
        return self.owners.share(parts, "model")

    def round_down_bits(self) -> int:
        assert self.owners is not None
        return (
            super().round_down_bits()
            if self.options.downlink == "fp32"
            else self.owners.direction_bits(zeros=self.options.sign == "random3")
        )

    def planned_bits(self, steps: int) -> dict[str, tuple[int, int]]:
        parts = super().planned_bits(steps)
        if self.owners is None or self.options.sign == "exact" or self.options.bound != "max":
            return parts
        rounds = steps // self.options.local_steps
        return {**parts, "bounds": (0, rounds * self.owners.largest_bits(len(self.setup.layout)))}

    def _signs(self, vectors: list[Tensor], pieces: list[Piece]) -> list[Tensor]:
        """Signs of the hosted pieces of one vector."""
        if self.options.sign == "exact":
            return [torch.sign(v) for v in vectors]
        key = self.setup.ctx.key("sign", pieces[0].round)
        bounds = self._bounds(vectors, pieces)
        return [signs(v, self.options.sign, b, key, p.start) for v, b, p in zip(vectors, bounds, pieces, strict=True)]

    def _bounds(self, vectors: list[Tensor], pieces: list[Piece]) -> list[Tensor]:
        """B of every element of the hosted pieces; owners of parts of a tensor tell each other the largest value in theirs."""
        layout = self.setup.layout
        if self.options.bound != "max":
            return [torch.full_like(v, self.options.bound) for v in vectors]
        mine = [maxima(v, layout, piece.start) for v, piece in zip(vectors, pieces, strict=True)]
        most = mine[0] if self.owners is None else self.owners.largest(mine, "bounds")
        spread = torch.repeat_interleave(most, torch.tensor([part.numel for part in layout], device=most.device))
        return [spread[piece.start : piece.stop] for piece in pieces]

    def _move(self, x: Tensor, s: Tensor, gamma: float, piece: Piece) -> None:
        """Decay, then step."""
        o = self.options
        inside = [(max(a, piece.start) - piece.start, min(b, piece.stop) - piece.start) for a, b in self.ranges]
        shrink(x, [(a, b) for a, b in inside if b > a], 1 - o.eta * gamma * o.weight_decay)
        x.add_(s, alpha=-o.eta * gamma)


def maxima(v: Tensor, layout: list[Slice], start: int = 0) -> Tensor:
    """Largest absolute value of each tensor of ``layout`` within ``v``, a part of a flat vector from ``start`` on; 0 outside it."""
    inside = [v[max(part.start - start, 0) : max(part.stop - start, 0)] for part in layout]
    return torch.stack([piece.abs().max() if piece.numel() else v.new_zeros(()) for piece in inside])


def signs(v: Tensor, kind: str, bound: Tensor | float, key: Key, start: int = 0) -> Tensor:
    """Randomised signs of ``v`` (shape (n,)), in v's dtype; zero where B is zero.

    Args:
        kind: "random2" or "random3".
        bound: B, one number or one per element; a value beyond it is drawn as if it were B.
        key, start: the draw; element i uses counter start + i, so a part of a vector draws what the whole would.
    """
    scale = torch.as_tensor(bound, dtype=v.dtype, device=v.device).expand_as(v)
    share = torch.where(scale > 0, v / scale, torch.zeros_like(v)).clamp_(-1, 1)
    uniform = torch.from_numpy((key.bits(v.numel(), start) >> 8).astype("float32") * 2.0**-24).to(v.device, v.dtype)
    if kind == "random3":
        return torch.where(uniform < share.abs(), torch.sign(v), torch.zeros_like(v))
    drawn = torch.where(uniform < 0.5 + 0.5 * share, torch.ones_like(v), -torch.ones_like(v))
    return torch.where(scale > 0, drawn, torch.zeros_like(v))
