"""Triton kernels for CUDA: random rounding and packing in one pass, unpacking and look-up in another.

The same float operations as the portable path, so the same bytes: uniforms from the counter-based hash, comparisons of
``v - b_k > u (b_k+1 - b_k)`` in float32 without fused multiply-adds, the planar layout of packing.py.
A program works on a run of groups; symbol i of group j is element i G + j. 4 bytes are read and 0.1 to 0.5 written per element,
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
#: alphabets that the kernels serve: those of BinGrad and of ORQ with up to 17 levels
BASES = (2, 3, 5, 9, 17)


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
def _word(
    values: tl.tensor,
    levels: tl.tensor,
    group: tl.tensor,
    inside: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
    bucket: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    BASE: tl.constexpr,
    FIRST: tl.constexpr,
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Sum of BASE^i q_i over MANY symbols of each group from the FIRST on: int64 where WIDE, else int32."""
    word = tl.zeros(group.shape, dtype=tl.int64 if WIDE else tl.int32)
    for i in tl.static_range(MANY):
        at = group + (FIRST + MANY - 1 - i) * count  # the highest place first
        there = inside & (at < length)
        v = tl.load(values + at, mask=there, other=0.0) * scale
        row = (at // bucket) * BASE
        u = _uniform((at & 0xFFFFFFFF).to(tl.uint32), low, high)
        symbol = tl.zeros(group.shape, dtype=tl.int32)
        below = tl.load(levels + row, mask=there, other=0.0) * scale
        for k in range(BASE - 1):  # not unrolled: 17 levels would make long code
            above = tl.load(levels + row + k + 1, mask=there, other=0.0) * scale
            symbol += ((v - below) > u * (above - below)).to(tl.int32)
            below = above
        word = word * BASE + tl.where(there, symbol, 0)
    return word


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
    if BASE == 5:  # byte p: code p of three symbols, and bit p of the eighth code on top
        last = _word(values, levels, group, inside, length, count, bucket, low, high, scale, 5, 21, 3, False)
        for p in tl.static_range(7):
            code = _word(values, levels, group, inside, length, count, bucket, low, high, scale, 5, 3 * p, 3, False)
            tl.store(out + p * count + group, (code | ((last >> p) & 1) << 7).to(tl.uint8), mask=inside)
    else:
        word = _word(values, levels, group, inside, length, count, bucket, low, high, scale, BASE, 0, MANY, SIZE > 2)
        for p in tl.static_range(SIZE):
            place = group * SIZE + p if SIZE <= 2 else p * count + group
            tl.store(out + place, ((word >> (8 * p)) & 255).to(tl.uint8), mask=inside)


@triton.jit
def _spread(
    word: tl.tensor,
    levels: tl.tensor,
    out: tl.tensor,
    group: tl.tensor,
    inside: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
    bucket: tl.tensor,
    BASE: tl.constexpr,
    FIRST: tl.constexpr,
    MANY: tl.constexpr,
) -> None:
    """Levels of the MANY digits of ``word``, the FIRST symbol's the lowest, to their places in ``out``."""
    for i in tl.static_range(MANY):
        rest = word // BASE
        at = group + (FIRST + i) * count
        there = inside & (at < length)
        value = tl.load(levels + (at // bucket) * BASE + (word - rest * BASE), mask=there, other=0.0)
        tl.store(out + at, value, mask=there)
        word = rest


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
    if BASE == 5:
        last = tl.zeros((BLOCK,), dtype=tl.int32)
        for p in tl.static_range(7):
            byte = tl.load(data + p * count + group, mask=inside, other=0).to(tl.int32)
            last += (byte >> 7) << p
            _spread(byte & 127, levels, out, group, inside, length, count, bucket, 5, 3 * p, 3)
        _spread(last, levels, out, group, inside, length, count, bucket, 5, 21, 3)
    else:
        word = tl.zeros((BLOCK,), dtype=tl.int64 if SIZE > 2 else tl.int32)
        for p in tl.static_range(SIZE):
            place = group * SIZE + p if SIZE <= 2 else p * count + group
            word += tl.load(data + place, mask=inside, other=0).to(word.dtype) << (8 * p)
        _spread(word, levels, out, group, inside, length, count, bucket, BASE, 0, MANY)


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
