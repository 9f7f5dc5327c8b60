"""Compiled kernels: the same float operations in the same order as the pure path, so the same bits. Needs numba.

No fast-math and no contraction into fused multiply-adds: the tests compare every kernel with the pure path bit for bit.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_GOLDEN, _M1, _M2 = np.uint32(0x9E3779B1), np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)
_S8, _S15, _S16 = np.uint32(8), np.uint32(15), np.uint32(16)
_UNIT = np.float32(2.0**-24)
_LANES = 16


@njit(cache=True, inline="always")
def _hashed(counter: np.uint32, low: np.uint32, high: np.uint32) -> np.uint32:
    h = np.uint32(np.uint32(counter * _GOLDEN) + low)
    h = np.uint32(np.uint32(h ^ np.uint32(h >> _S16)) * _M1)
    h = np.uint32(h ^ high)
    h = np.uint32(np.uint32(h ^ np.uint32(h >> _S15)) * _M2)
    return np.uint32(h ^ np.uint32(h >> _S15))


@njit(cache=True)
def round_rows(rows: np.ndarray, levels: np.ndarray, low: np.uint32, high: np.uint32, start: np.uint32, out: np.ndarray) -> None:
    """Random rounding of rows (B, n) onto levels (B, s), uniforms drawn for the counters start, start+1, ..."""
    count, n = rows.shape
    uniforms = np.empty(n, np.float32)
    total = np.empty(n, np.int32)
    for i in range(count):
        first = np.uint32(start + np.uint32(i * n))
        row = rows[i]
        for j in range(n):
            word = _hashed(np.uint32(first + np.uint32(j)), low, high)
            uniforms[j] = np.float32(np.int32(np.uint32(word >> _S8))) * _UNIT
            total[j] = 0
        for k in range(levels.shape[1] - 1):
            level = levels[i, k]
            width = np.float32(levels[i, k + 1] - level)
            for j in range(n):
                total[j] += np.int32(np.float32(row[j] - level) > np.float32(uniforms[j] * width))
        for j in range(n):
            out[i, j] = np.uint8(total[j])


@njit(cache=True, error_model="numpy")
def greedy_rows(values: np.ndarray, levels: int, out: np.ndarray) -> None:
    """Levels by bisection with (C3) of sorted rows (B, n), to ``out`` (B, levels)."""
    count, n = values.shape
    prefix = np.empty(n + 1, np.float64)
    prefix[0] = 0.0
    position = np.empty(levels, np.int64)
    for i in range(count):
        row = values[i]
        total = 0.0
        for j in range(n):
            total += np.float64(row[j])
            prefix[j + 1] = total
        position[0], position[levels - 1] = 0, n - 1
        step = levels - 1
        while step > 1:
            half = step // 2
            for k in range(0, levels - 1, step):
                left, right = position[k], position[k + step]
                low, high = np.float64(row[left]), np.float64(row[right])
                m = right + 1 - left
                area = prefix[right + 1] - prefix[left] - np.float64(m) * low
                rank = math.ceil(np.float64(m) - area / (high - low)) if high > low else 1.0
                q = np.int64(min(max(rank, 1.0), np.float64(m)))
                position[k + half] = left + q - 1
            step = half
        for k in range(levels):
            out[i, k] = row[position[k]]


@njit(cache=True)
def look_up_rows(levels: np.ndarray, symbols: np.ndarray, out: np.ndarray) -> None:
    """``out[i, j] = levels[i, symbols[i, j]]``; symbols are below the number of levels."""
    count, n = symbols.shape
    table = np.zeros(256, np.float32)
    for i in range(count):
        for k in range(levels.shape[1]):
            table[k] = levels[i, k]
        for j in range(n):
            out[i, j] = table[symbols[i, j]]


@njit(cache=True)
def hadamard_rows(rows: np.ndarray, out: np.ndarray) -> None:
    """Walsh-Hadamard transform of rows (B, N) to ``out``: 16 rows side by side, two steps of butterflies at a time."""
    count, n = rows.shape
    work = np.zeros((n, _LANES), np.float32)
    for first in range(0, count, _LANES):
        lanes = min(_LANES, count - first)
        for lane in range(lanes):
            for j in range(n):
                work[j, lane] = rows[first + lane, j]
        half = 1
        while 2 * half < n:
            for block in range(0, n, 4 * half):
                for j in range(block, block + half):
                    for lane in range(_LANES):
                        a, b = work[j, lane], work[j + half, lane]
                        c, d = work[j + 2 * half, lane], work[j + 3 * half, lane]
                        p, q, r, s = a + b, a - b, c + d, c - d
                        work[j, lane], work[j + half, lane] = p + r, q + s
                        work[j + 2 * half, lane], work[j + 3 * half, lane] = p - r, q - s
            half *= 4
        if half < n:
            for j in range(half):
                for lane in range(_LANES):
                    a, b = work[j, lane], work[j + half, lane]
                    work[j, lane], work[j + half, lane] = a + b, a - b
        for lane in range(lanes):
            for j in range(n):
                out[first + lane, j] = work[j, lane]
