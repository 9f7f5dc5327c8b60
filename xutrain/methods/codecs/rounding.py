"""Symbols from values and values from symbols: random rounding onto levels, thresholds, table look-up.

Everything is exact comparison arithmetic in float32, so that the CPU, a compiled kernel and a GPU agree bit for bit once
they hold the same levels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import Issue, UsageError
from xutrain.methods.codecs import fast


def on_host(device: torch.device) -> bool:
    """Whether numpy can work on this device's memory; tests turn it off to run what a GPU runs."""
    return device.type == "cpu"


_PIECE = 1 << 14
_HUGE = 8.0e37  # beyond this, differences of two float32 values may overflow


def need_key(key: Key | None, name: str) -> Key:
    """The key, or an error that says how to make one. Raises UsageError."""
    if key is None:
        hint = 'codec.encode(vector, key=xutrain.key(seed=0, stream="round", step=0, worker=0))'
        raise UsageError(Issue("key", f"codec {name} draws random numbers and needs a key", hint=hint, has_value=False))
    return key


def row_sums(rows: Tensor) -> Tensor:
    """Sums of rows (B, n), float64 (B, 1), in an order that does not depend on the number of threads.

    torch splits one long row among its threads, so long rows are summed in pieces of fixed size.
    """
    full = rows.shape[1] // _PIECE * _PIECE
    if rows.shape[1] <= _PIECE:
        return rows.sum(1, keepdim=True, dtype=torch.float64)
    pieces = rows[:, :full].reshape(len(rows), -1, _PIECE).sum(2, dtype=torch.float64)
    return pieces.sum(1, keepdim=True) + rows[:, full:].sum(1, keepdim=True, dtype=torch.float64)


class Draws(NamedTuple):
    """Elements ``start``, start + 1, ... of ``key.uniform``, drawn when they are needed."""

    key: Key
    start: int

    def uniforms(self, shape: torch.Size, device: torch.device) -> Tensor:
        """float32 in [0, 1) of ``shape`` on ``device``."""
        return self.key.uniform(shape.numel(), device, self.start).view(shape)


def safe_scale(levels: Tensor) -> float:
    """By what values and levels are multiplied before they are compared: 1, or a quarter where differences might overflow."""
    return 0.25 if levels.numel() and float(levels.abs().amax()) > _HUGE else 1.0


def round_randomly(rows: Tensor, levels: Tensor, draws: Draws, out: Tensor) -> None:
    """Random rounding of ``rows`` (B, n) onto ascending ``levels`` (B, s): symbols to ``out``, uint8 (B, n).

    A value in [b_k, b_k+1] becomes k+1 with probability (v - b_k) / (b_k+1 - b_k); values beyond the outer levels are clipped
    to them. The symbol is the number of cells k with ``v - b_k > u (b_k+1 - b_k)``: true for every cell below the value, false
    for every cell above it, and at a level itself false, because u < 1 and the difference is the same float (widths below
    1e-37 lose that to subnormal products). Of equal levels the first is taken.
    """
    scale = safe_scale(levels)
    if scale != 1.0:
        rows, levels = rows * scale, levels * scale
    compiled = fast.kernels(rows.numel()) if on_host(rows.device) else None
    if compiled:
        low, high = map(np.uint32, draws.key.words)
        start = np.uint32(draws.start & 0xFFFFFFFF)
        compiled.round_rows(rows.contiguous().numpy(), levels.contiguous().numpy(), low, high, start, out.numpy())
        return
    uniforms = draws.uniforms(rows.shape, rows.device)
    widths = levels[:, 1:] - levels[:, :-1]
    difference, scaled = torch.empty_like(rows), torch.empty_like(rows)
    hit = torch.empty_like(out)
    for k in range(levels.shape[1] - 1):
        torch.sub(rows, levels[:, k : k + 1], out=difference)
        torch.mul(uniforms, widths[:, k : k + 1], out=scaled)
        if k == 0:
            greater(difference, scaled, out)
        else:
            greater(difference, scaled, hit)
            out.add_(hit)


def greater(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a > b`` as 0 and 1, shapes that broadcast to ``out``'s; numpy's comparison is four times faster than torch's on a CPU."""
    if on_host(a.device):
        np.greater(a.numpy(), b.numpy(), out=out.view(torch.bool).numpy())
    else:
        torch.gt(a, b, out=out.view(torch.bool))


def at_least(rows: Tensor, threshold: Tensor | float, out: Tensor) -> None:
    """``out = rows >= threshold`` as 0 and 1; threshold a number or of shape (B, 1)."""
    if on_host(rows.device):
        other = threshold.numpy() if isinstance(threshold, Tensor) else np.float32(threshold)
        np.greater_equal(rows.numpy(), other, out=out.view(torch.bool).numpy())
    else:
        torch.ge(rows, threshold, out=out.view(torch.bool))


def look_up(levels: Tensor, symbols: Tensor, out: Tensor) -> None:
    """``out[i, j] = levels[i, symbols[i, j]]``: levels (B, s), symbols uint8 (B, n), out float32 (B, n)."""
    if not on_host(out.device):
        torch.gather(levels, 1, symbols.long(), out=out)
        return
    compiled = fast.kernels(out.numel())
    if compiled:
        compiled.look_up_rows(levels.contiguous().numpy(), symbols.contiguous().numpy(), out.numpy())
    else:
        index = symbols.numpy().astype(np.intp)
        index += np.arange(len(levels), dtype=np.intp)[:, None] * levels.shape[1]
        np.take(levels.numpy().reshape(-1), index, out=out.numpy(), mode="clip")


def moments(rows: Tensor, kept: Tensor, levels: Tensor) -> tuple[float, float]:
    """Squared bias and variance of randomly rounding ``kept``, what clipping left of ``rows``, summed over all elements in float64.

    The variance of an element is (b_k+1 - v)(v - b_k); the bias is what the clipping and the outer levels cut off.
    """
    v, b = rows.double(), levels.double()
    w = kept.double().clamp(b[:, :1], b[:, -1:])
    cell = (torch.searchsorted(b.contiguous(), w.contiguous(), right=True) - 1).clamp(0, b.shape[1] - 2)
    below, above = b.gather(1, cell), b.gather(1, cell + 1)
    return float((v - w).square().sum()), float(((above - w) * (w - below)).sum())
