"""Sums over calibration tokens, all weighted by g squared, in the order of tokens.

Second moments are enough for Wanda and MoE-Pruner (d_in numbers a matrix); ``path`` needs one vector per output row, and
SparseGPT the whole matrix of products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.prune.base import Chunk, Expert, Statistics


def squared_norms(z: Tensor, g: Tensor) -> Tensor:
    """s_j = sum_t g_t^2 z_tj^2, shape (d_in,), for z (t, d_in) and g (t,)."""
    wide = torch.promote_types(z.dtype, torch.float32)
    g, z = g.to(wide), z.to(wide)
    return (g * g) @ (z * z)


class Moments(Statistics):
    """s for the three matrices: ``gate`` and ``up`` share the input x, ``down`` sees h."""

    def __init__(self, expert: Expert) -> None:
        super().__init__(expert)
        self.x, self.h = self.zeros(expert.gate.shape[1]), self.zeros(expert.down.shape[1])

    def add(self, chunk: Chunk) -> None:
        self.x += squared_norms(chunk.x, chunk.g)
        self.h += squared_norms(chunk.h, chunk.g)

    def state(self) -> dict[str, Tensor]:
        return {"x": self.x, "h": self.h}


def silu_slope(a: Tensor) -> Tensor:
    """silu'(a) = sigma(a) (1 + a (1 - sigma(a)))."""
    sigma = torch.sigmoid(a)
    return sigma * (1 + a * (1 - sigma))


class PathMoments(Statistics):
    """Token weights differ from output row to output row: (weights)^T @ x^2, one matrix product each for W1 and W3.

    gate: g^2 (silu'(a_m) b_m)^2, first order in W1; up: g^2 silu(a_m)^2, exact because W3 enters linearly; down: g^2.
    """

    def __init__(self, expert: Expert) -> None:
        super().__init__(expert)
        self.gate, self.up = self.zeros(*expert.gate.shape), self.zeros(*expert.up.shape)
        self.h = self.zeros(expert.down.shape[1])

    def add(self, chunk: Chunk) -> None:
        x, g, a, b = (z.to(self.dtype) for z in (chunk.x, chunk.g.unsqueeze(1), chunk.a, chunk.b))
        x2 = x * x
        self.gate += (g * silu_slope(a) * b).square_().T @ x2
        self.up += (g * torch.nn.functional.silu(a)).square_().T @ x2
        self.h += squared_norms(chunk.h, chunk.g)

    def state(self) -> dict[str, Tensor]:
        return {"gate": self.gate, "up": self.up, "h": self.h}


class Hessians(Statistics):
    """H = sum_t g_t^2 z_t z_t^T for x (d, d) and for h (f, f); SparseGPT's factor 2/N changes nothing."""

    def __init__(self, expert: Expert) -> None:
        super().__init__(expert)
        d, f = expert.gate.shape[1], expert.down.shape[1]
        self.x, self.h = self.zeros(d, d), self.zeros(f, f)

    def add(self, chunk: Chunk) -> None:
        for total, z in ((self.x, chunk.x), (self.h, chunk.h)):
            weighted = z.to(self.dtype) * chunk.g.to(self.dtype).unsqueeze(1)
            total += weighted.T @ weighted

    def state(self) -> dict[str, Tensor]:
        return {"x": self.x, "h": self.h}
