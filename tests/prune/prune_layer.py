"""A small MoE layer in double precision that the tests of scores share."""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.prune.base import Chunk, Expert, Routing, Statistics, Tokens


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expert(d: int = 12, f: int = 20, seed: int = 0) -> Expert:
    g = rng(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Expert(draw(f, d) / d**0.5, draw(f, d) / d**0.5, draw(d, f) / f**0.5)


def routing(x: Tensor, experts: int = 4, k: int = 2, seed: int = 9, renormalise: bool = True) -> Routing:
    router = torch.randn(experts, x.shape[1], generator=rng(seed), dtype=x.dtype)
    prob = (x @ router.T).softmax(-1)
    weight, index = prob.topk(k, -1)
    return Routing(index, weight / weight.sum(-1, keepdim=True) if renormalise else weight, prob)


def tokens(n: int = 64, d: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(n, d, generator=rng(seed), dtype=torch.float64)


def gather(method: object, e: Expert, x: Tensor, chosen: Tokens, chunk: int = 1000) -> Statistics | None:
    """The statistics of a method over chosen tokens, fed in chunks."""
    sums = method.begin(e)  # type: ignore[attr-defined]
    for start in range(0, len(chosen.index), chunk):
        z = x[chosen.index[start : start + chunk]]
        if sums is not None:
            sums.add(Chunk(z, chosen.weight[start : start + chunk], *e.inner(z)))
    return sums
