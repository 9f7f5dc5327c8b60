"""Triton kernels for CUDA: random rounding and packing in one pass, unpacking and look-up in another.

The same float operations as the portable path, so the same bytes: uniforms from the counter-based hash, comparisons of
``v - b_k > u (b_k+1 - b_k)`` in float32 without fused multiply-adds, the planar layout of packing.py.
A program works on a run of groups; symbol i of group j is element i G + j. 4 bytes are read and 0.2 to 0.4 written per element,
where the portable path passes over the vector several times for every level. Levels themselves are found by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xutrain.methods.codecs import packing

_BLOCK = 256
_EXACT = {"enable_fp_fusion": False}
#: alphabets whose groups are short words: 5 ternary symbols in a byte, 5 of base 9 in two
BASES = (2, 3, 9)


@triton.jit
def _uniform(counter: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """float32 in [0, 1) for uint32 counters: see engine/rng.py."""
    h = counter * 0x9E3779B1 + low
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = h ^ high
    h = (h ^ (h >> 15)) * 0x735A2D97
    h = h ^ (h >> 15)
    return (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _pack(
    values: tl.tensor,
    levels: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
    bucket: tl.tensor,
    key: tl.tensor,
    scale: tl.tensor,
    BASE: tl.constexpr,
    MANY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    low, high = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    word = tl.zeros((BLOCK,), dtype=tl.int32)
    power = 1
    for i in tl.static_range(MANY):
        at = group + i * count
        there = inside & (at < length)
        v = tl.load(values + at, mask=there, other=0.0) * scale
        row = (at // bucket) * BASE
        u = _uniform((at & 0xFFFFFFFF).to(tl.uint32), low, high)
        symbol = tl.zeros((BLOCK,), dtype=tl.int32)
        below = tl.load(levels + row, mask=there, other=0.0) * scale
        for k in tl.static_range(BASE - 1):
            above = tl.load(levels + row + k + 1, mask=there, other=0.0) * scale
            symbol += ((v - below) > u * (above - below)).to(tl.int32)
            below = above
        word += tl.where(there, symbol, 0) * power
        power = power * BASE
    for p in tl.static_range(SIZE):
        tl.store(out + group * SIZE + p, ((word >> (8 * p)) & 255).to(tl.uint8), mask=inside)


@triton.jit
def _unpack(
    data: tl.tensor,
    levels: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
    bucket: tl.tensor,
    BASE: tl.constexpr,
    MANY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    word = tl.zeros((BLOCK,), dtype=tl.int32)
    for p in tl.static_range(SIZE):
        word += tl.load(data + group * SIZE + p, mask=inside, other=0).to(tl.int32) << (8 * p)
    for i in tl.static_range(MANY):
        rest = word // BASE
        at = group + i * count
        there = inside & (at < length)
        value = tl.load(levels + (at // bucket) * BASE + (word - rest * BASE), mask=there, other=0.0)
        tl.store(out + at, value, mask=there)
        word = rest


def pack(vector: Tensor, levels: Tensor, bucket: int, words: tuple[int, int], scale: float, out: Tensor) -> None:
    """Random rounding of ``vector`` (n,) onto ``levels`` (buckets, base) and packing, to ``out``, uint8 of the packed size.

    ``scale`` is 1, or a power of two that keeps differences of huge values finite.
    """
    base, length = levels.shape[1], vector.numel()
    many, size = packing.layout(base)
    count = packing.groups(base, length)
    key = torch.tensor(words, dtype=torch.int64, device=vector.device)  # 32-bit words, some of them above what an int argument holds
    _pack[(triton.cdiv(count, _BLOCK),)](
        vector, levels, out, length, count, bucket, key, scale, BASE=base, MANY=many, SIZE=size, BLOCK=_BLOCK, **_EXACT
    )


def unpack(data: Tensor, levels: Tensor, bucket: int, out: Tensor) -> None:
    """What ``data`` stands for, to ``out``, float32 (n,)."""
    base, length = levels.shape[1], out.numel()
    many, size = packing.layout(base)
    count = packing.groups(base, length)
    _unpack[(triton.cdiv(count, _BLOCK),)](
        data, levels, out, length, count, bucket, BASE=base, MANY=many, SIZE=size, BLOCK=_BLOCK, **_EXACT
    )
