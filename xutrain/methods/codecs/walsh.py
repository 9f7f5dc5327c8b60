"""The Walsh-Hadamard transform of rows, by butterflies in a fixed order of additions: the same bits on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.codecs import fast, rounding


def hadamard(rows: Tensor) -> Tensor:
    """H x for every row x of ``rows`` (B, N), N a power of two; H has entries +-1 and H H = N. Returns a new tensor."""
    count, n = rows.shape
    assert n & (n - 1) == 0, n
    compiled = fast.kernels(rows.numel()) if rounding.on_host(rows.device) else None
    if compiled:
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        compiled.hadamard_rows(rows.contiguous().numpy(), out.numpy())
        return out
    columns = rows.t().contiguous()  # every step then adds long contiguous runs
    other = torch.empty_like(columns)
    half = 1
    while half < n:
        pairs, sums = columns.view(-1, 2, half, count), other.view(-1, 2, half, count)
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        columns, other = other, columns
        half *= 2
    return columns.t().contiguous()
