"""Symbols of a small alphabet as bytes, exactly: ``base ** k <= 256 ** m`` packs k symbols in m bytes.

The symbols of a whole vector are one stream in planar order: with G groups, symbol i of group j stands at ``i * G + j``, so
that every step is an operation on contiguous planes. Only the last plane is padded, with symbol 0; the receiver knows the
length. The same operators run on numpy arrays (CPU) and on torch tensors (any device) and give the same bytes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xutrain.methods.codecs import rounding

_CHUNK = 1 << 14  # groups packed at a time, so that the planes of a chunk stay in the cache


class Layout(NamedTuple):
    """``symbols`` of the alphabet in ``size`` bytes."""

    symbols: int
    size: int


@functools.cache
def layout(base: int) -> Layout:
    """How an alphabet of ``base`` symbols is packed.

    8 binary symbols and 5 ternary ones take a byte, 24 of base 5 take 7 bytes, 5 of base 9 two bytes, 15 of base 17 eight
    bytes; any other base takes the fewest bits per symbol within 8 bytes.
    """
    assert 2 <= base <= 256, base
    best = Layout(1, 1)
    for size in range(1, 9):
        symbols = 1
        while base ** (symbols + 1) <= min(256**size, 2**63):
            symbols += 1
        if symbols * best.size > best.symbols * size:
            best = Layout(symbols, size)
    return best


def groups(base: int, length: int) -> int:
    """Number of groups that ``length`` symbols fill."""
    return -(-length // layout(base).symbols)


def packed_bytes(base: int, length: int) -> int:
    """Bytes that ``length`` symbols take."""
    return groups(base, length) * layout(base).size


def room(base: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised uint8 buffer for ``length`` symbols whose padding is already zero; ``pack`` takes it as it is."""
    full = groups(base, length) * layout(base).symbols
    buffer = torch.empty(full, dtype=torch.uint8, device=device)
    buffer[length:] = 0
    return buffer


def pack(symbols: Tensor, base: int, out: Tensor | None = None) -> Tensor:
    """uint8 symbols below ``base``, of shape (n,), as uint8 of shape (packed_bytes(base, n),); written to ``out`` if given."""
    many, size = layout(base)
    n = symbols.numel()
    count = groups(base, n)
    if n != count * many:
        padded = room(base, n, symbols.device)
        padded[:n] = symbols
        symbols = padded
    data = torch.empty(count * size, dtype=torch.uint8, device=symbols.device) if out is None else out
    planes, target = _arrays(symbols.view(many, count), data)
    for at in range(0, count, _CHUNK):
        _pack_chunk(planes[:, at : at + _CHUNK], target, base, at, count)
    return data


def unpack(data: Tensor, base: int, length: int) -> Tensor:
    """The ``length`` symbols in ``data``, uint8 of shape (length,): the inverse of ``pack``."""
    many, _ = layout(base)
    count = groups(base, length)
    symbols = torch.empty(count * many, dtype=torch.uint8, device=data.device)
    planes, source = _arrays(symbols.view(many, count), data)
    for at in range(0, count, _CHUNK):
        _unpack_chunk(source, planes[:, at : at + _CHUNK], base, at, count)
    return symbols[:length]


def _arrays(planes: Tensor, data: Tensor) -> tuple[Any, Any]:
    """Numpy views on the CPU, where its integer arithmetic is several times faster than torch's; tensors elsewhere."""
    return (planes.numpy(), data.numpy()) if rounding.on_host(planes.device) else (planes, data)


def _wide(array: Any, bits: int) -> Any:
    """The array in a type that holds ``bits`` bits (torch has few operations on unsigned words)."""
    if isinstance(array, Tensor):
        return array.to(torch.int32 if bits <= 16 else torch.int64)
    return array.astype(np.uint16 if bits <= 16 else np.int64)


def _narrow(array: Any) -> Any:
    return array.to(torch.uint8) if isinstance(array, Tensor) else array.astype(np.uint8)


def _pack_chunk(q: Any, data: Any, base: int, at: int, count: int) -> None:
    width = q.shape[1]
    if base == 2:
        # byte = sum of 2^i q_i
        data[at : at + width] = q[0] | q[1] << 1 | q[2] << 2 | q[3] << 3 | q[4] << 4 | q[5] << 5 | q[6] << 6 | q[7] << 7
    elif base == 3:
        # byte = q0 + 3 q1 + 9 q2 + 27 q3 + 81 q4 <= 242
        data[at : at + width] = q[0] + q[1] * 3 + q[2] * 9 + q[3] * 27 + q[4] * 81
    elif base == 5:
        # byte p: code p = q0 + 5 q1 + 25 q2 of the symbols 3p.., and bit p of code 7 on top
        last = q[21] + q[22] * 5 + q[23] * 25
        for p in range(7):
            code = q[3 * p] + q[3 * p + 1] * 5 + q[3 * p + 2] * 25
            data[p * count + at : p * count + at + width] = code | ((last >> p) & 1) << 7
    elif base == 9:
        # 16-bit word, little endian = sum of 9^i q_i <= 59048; pairs fit a byte (80)
        low, high = q[0] + q[1] * 9, q[2] + q[3] * 9
        word = _wide(low, 16) + _wide(high, 16) * 81 + _wide(q[4], 16) * 6561
        _put_word(data, word, at, width)
    else:
        many, size = layout(base)
        word = _wide(q[many - 1], 64)
        for i in range(many - 2, -1, -1):
            word = word * base + _wide(q[i], 64)
        for p in range(size):
            data[p * count + at : p * count + at + width] = _narrow((word >> (8 * p)) & 255)


def _unpack_chunk(data: Any, q: Any, base: int, at: int, count: int) -> None:
    width = q.shape[1]
    if base == 2:
        byte = data[at : at + width]
        for i in range(8):
            q[i] = (byte >> i) & 1
    elif base == 3:
        _digits(data[at : at + width], q, 3)
    elif base == 5:
        last = None
        for p in range(7):
            byte = data[p * count + at : p * count + at + width]
            _digits(byte & 127, q[3 * p : 3 * p + 3], 5)
            bit = (byte >> 7) << p
            last = bit if last is None else last | bit
        _digits(last, q[21:24], 5)
    elif base == 9:
        word = _get_word(data, at, width)
        high = word // 6561  # 9^4
        rest = word - high * 6561
        q[4] = _narrow(high)
        top = rest // 81
        _digits(_narrow(top), q[2:4], 9)
        _digits(_narrow(rest - top * 81), q[0:2], 9)
    else:
        many, size = layout(base)
        word = _wide(data[at : at + width], 64)
        for p in range(1, size):
            word = word | _wide(data[p * count + at : p * count + at + width], 64) << (8 * p)
        for i in range(many):
            rest = word // base
            q[i] = _narrow(word - rest * base)
            word = rest


def _digits(code: Any, q: Any, base: int) -> None:
    """The digits of ``code``, the lowest first; the last plane takes what is left."""
    for i in range(len(q) - 1):
        rest = code // base
        q[i] = code - rest * base
        code = rest
    q[len(q) - 1] = code


def _put_word(data: Any, word: Any, at: int, width: int) -> None:
    if isinstance(data, Tensor):
        data[2 * at : 2 * (at + width)] = torch.stack((word & 255, word >> 8), dim=1).to(torch.uint8).view(-1)
    else:
        data[2 * at : 2 * (at + width)] = word.astype("<u2", copy=False).view(np.uint8)


def _get_word(data: Any, at: int, width: int) -> Any:
    if isinstance(data, Tensor):
        pair = data[2 * at : 2 * (at + width)].view(-1, 2).to(torch.int32)
        return pair[:, 0] + pair[:, 1] * 256
    return data[2 * at : 2 * (at + width)].copy().view("<u2")
