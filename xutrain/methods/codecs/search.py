"""Optimal levels of a bucket from its sorted values and their prefix sums (arXiv 2002.11082; equations C1 to C4).

All sums are float64. A level that is an element of the bucket is known by its position in sorted order; how ties are counted
at either end of an interval changes neither the error nor the element that (C3) selects.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xutrain.methods.codecs import fast, rounding


class SortedRows(NamedTuple):
    """Rows in ascending order (B, n) and their prefix sums (B, n+1), float64, the first of them 0."""

    values: Tensor
    prefix: Tensor

    @property
    def n(self) -> int:
        return self.values.shape[1]

    def at(self, position: Tensor) -> Tensor:
        """Values at ``position`` (B, k), float64."""
        return self.values.gather(1, position).double()

    def below(self, position: Tensor) -> Tensor:
        """Sums of the first ``position`` values (B, k)."""
        return self.prefix.gather(1, position)

    def mirrored(self) -> SortedRows:
        """The rows negated, in ascending order again."""
        return with_prefix(-self.values.flip(1))


def with_prefix(values: Tensor) -> SortedRows:
    """Prefix sums of rows that are in order already."""
    prefix = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.float64, device=values.device)
    torch.cumsum(values, 1, dtype=torch.float64, out=prefix[:, 1:])
    return SortedRows(values, prefix)


def sort_rows(rows: Tensor) -> SortedRows:
    """Sort every row; numpy's vectorised sort is 15 to 40 times faster than torch's on a CPU."""
    if rounding.on_host(rows.device):
        return with_prefix(torch.from_numpy(np.sort(rows.numpy(), axis=1)))
    return with_prefix(torch.sort(rows, dim=1).values)


class Cuts(NamedTuple):
    """Levels (B, k): their values, float64, and how many elements lie below (``lo``) and up to (``hi``) each."""

    value: Tensor
    lo: Tensor
    hi: Tensor

    def pick(self, which: slice) -> Cuts:
        return Cuts(self.value[:, which], self.lo[:, which], self.hi[:, which])

    def put(self, which: slice, other: Cuts) -> None:
        for mine, new in zip(self, other, strict=True):
            mine[:, which] = new

    def mirrored(self, n: int) -> Cuts:
        return Cuts(-self.value.flip(1), (n - self.hi).flip(1), (n - self.lo).flip(1))


def at_positions(rows: SortedRows, position: Tensor) -> Cuts:
    """Levels that are elements of the rows."""
    return Cuts(rows.at(position), position, position + 1)


def middle(rows: SortedRows, left: Cuts, right: Cuts) -> Cuts:
    """The best level between two neighbours, (C3): the q-th smallest of the m elements in [b_l, b_r].

    q = clamp(ceil(m - A / R), 1, m) with A the sum of v - b_l over them and R = b_r - b_l.
    """
    m = right.hi - left.lo
    area = rows.below(right.hi) - rows.below(left.lo) - m * left.value
    q = torch.ceil(m - area / (right.value - left.value))
    q = torch.where(q >= 1, q, 1.0).clamp(max=rows.n).long()  # 1 also where b_l = b_r made it NaN
    position = (left.lo + torch.minimum(q, m.clamp(min=1)) - 1).clamp(max=rows.n - 1)
    return at_positions(rows, position)


def greedy(rows: SortedRows, levels: int) -> Cuts:
    """Levels by bisection, 2^K + 1 of them: the extremes, then the best level between every two, K times."""
    assert levels >= 3 and (levels - 1) & (levels - 2) == 0, levels
    shape = (len(rows.values), levels)
    position = torch.zeros(shape, dtype=torch.int64, device=rows.values.device)
    position[:, -1] = rows.n - 1
    cuts = at_positions(rows, position)
    step = levels - 1
    while step > 1:
        half = step // 2
        cuts.put(slice(half, None, step), middle(rows, cuts.pick(slice(0, -1, step)), cuts.pick(slice(step, None, step))))
        step = half
    return cuts


def greedy_levels(rows: Tensor, levels: int) -> Tensor:
    """The levels of ``greedy`` for unsorted rows (B, n): float32 (B, levels)."""
    compiled = fast.kernels(rows.numel()) if rounding.on_host(rows.device) else None
    if not compiled:
        return greedy(sort_rows(rows), levels).value.float()
    found = torch.empty(len(rows), levels)
    compiled.greedy_rows(np.sort(rows.numpy(), axis=1), levels, found.numpy())
    return found


def evenly(rows: SortedRows, levels: int) -> Cuts:
    """Levels at evenly spaced ranks, the extremes among them: a start for any number of levels."""
    rank = torch.linspace(0, rows.n - 1, levels, dtype=torch.float64, device=rows.values.device).round().long()
    return at_positions(rows, rank.expand(len(rows.values), levels).contiguous())


def sweep(rows: SortedRows, cuts: Cuts) -> bool:
    """One pass of (C3) over all inner levels, in place; the error never rises. True if a level moved.

    Levels of one parity do not see each other, so they are set together.
    """
    before = cuts.value.clone()
    for first in (1, 2):
        count = len(range(first, cuts.value.shape[1] - 1, 2))
        if count:
            left = cuts.pick(slice(first - 1, first - 1 + 2 * count - 1, 2))
            right = cuts.pick(slice(first + 1, first + 1 + 2 * count - 1, 2))
            mine = slice(first, first + 2 * count - 1, 2)
            best, old = middle(rows, left, right), cuts.pick(mine)
            empty = right.hi <= left.lo
            cuts.put(mine, Cuts(*(torch.where(empty, o, b) for o, b in zip(old, best, strict=True))))
    return not torch.equal(before, cuts.value)


def top(rows: SortedRows, inner: Cuts, weight: float) -> Cuts:
    """The best outermost level above ``inner`` (B, 1) for bias^2 + variance / weight.

    Condition: sum over the last cell of (v - b_inner) / weight = 2 * sum over v > b of (v - b). The left side minus the right
    one rises with b, so the crossing is found by halving over the elements and then in closed form. Infinite weight gives the
    maximum, weight 1 the partially biased levels.
    """
    n, start, total = rows.n, inner.lo, rows.prefix[:, -1:]

    def cell(end: Tensor) -> Tensor:  # sum over the elements start .. end-1 of v - b_inner
        return rows.below(end) - rows.below(start) - (end - start) * inner.value

    low, high = start.clamp(max=n - 1), torch.full_like(start, n - 1)
    for _ in range(n.bit_length()):
        j = (low + high) // 2
        tail = total - rows.below(j + 1) - (n - j - 1) * rows.at(j)
        enough = cell(j + 1) / weight - 2 * tail >= 0
        low, high = torch.where(enough, low, torch.minimum(j + 1, high)), torch.where(enough, j, high)
    j = high
    root = (total - rows.below(j) - cell(j) / (2 * weight)) / (n - j)
    floor = torch.where(j > start, rows.at((j - 1).clamp(min=0)), inner.value)
    upper = rows.at(j)
    value = torch.minimum(torch.maximum(root, floor), torch.maximum(upper, inner.value))
    return Cuts(value, j, j + (value >= upper).long())


def free_ends(rows: SortedRows, cuts: Cuts, weight: float, sweeps: int) -> Cuts:
    """Coordinate descent over all levels, the outer ones too, on bias^2 + variance / weight."""
    mirror = rows.mirrored()
    for _ in range(sweeps):
        before = cuts.value.clone()
        cuts.put(slice(-1, None), top(rows, cuts.pick(slice(-2, -1)), weight))
        cuts.put(slice(0, 1), top(mirror, cuts.pick(slice(1, 2)).mirrored(rows.n), weight).mirrored(rows.n))
        sweep(rows, cuts)
        if torch.equal(before, cuts.value):
            break
    return cuts


def partially_biased(rows: Tensor) -> Tensor:
    """The symmetric pair -b, +b: b (B, 1), float64, the root of n b = sum of |v| over |v| > b (C4).

    With |v| in descending order and prefix sums c_j, the sum falls as b grows and jumps at the elements; its crossing with n b
    is the largest of min(|v|_j, c_j / n).
    """
    down = sort_rows(-rows.abs())
    sums = down.prefix[:, 1:] / -rows.shape[1]
    return torch.minimum(-down.values.double(), sums).amax(1, keepdim=True)


def symmetric_ends(rows: Tensor, ordered: SortedRows) -> Cuts:
    """The pair of ``partially_biased`` within the range of the bucket, as two levels (B, 2).

    At least one element lies between them: the smallest |v| is at most b.
    """
    b = partially_biased(rows)
    wide = ordered.values.double()
    pair = torch.cat((-b, b), 1).clamp(wide[:, :1], wide[:, -1:])
    return Cuts(pair, torch.searchsorted(wide, pair), torch.searchsorted(wide, pair, right=True))
