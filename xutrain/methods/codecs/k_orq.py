"""ORQ with free outer levels for the error of a mean over K workers. Beyond the paper.

    least  sum (v - w)^2 + (b_{k+1} - w) (w - b_k) / K,   w = v clamped to [b_0, b_{s-1}],  b_k <= w <= b_{k+1}
    top:      sum_{last cell} (v - b_{s-2}) / K = 2 sum_{v > b_{s-1}} (v - b_{s-1});   bottom: its mirror image
    between:  (C3), as in ORQ

v are the elements of a bucket, b_0 .. b_{s-1} its levels, set in turn ``sweeps`` times; the sum is bias^2 + variance / K.

Limits: K = 1 is pb-ORQ, with 2 levels BinGrad-pb with free levels; an infinite K has minimum and maximum outside, as ORQ with
``refine``. Without ``clip`` and bf16 levels, a constant bucket comes back exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.methods.codecs.search import Cuts, SortedRows, at_positions, free_ends, sort_rows, symmetric_ends
from xutrain.registry import codec


@codec("k_orq", summary="beyond the paper: levels for the mean of K workers, bias^2 + variance / K")
class KORQ(ScalarCodec):
    """All levels, the outer ones too, minimise bias^2 + variance / K over the bucket.

    Averaging K messages divides the variance by K and leaves the bias, so the outer levels move outwards with K. K = 1 is
    pb-ORQ, and with two levels BinGrad-pb with free levels; an infinite K is ORQ.
    """

    random = True
    biased = True
    at_a_time = 1 << 20  # many small steps over all buckets at once

    class Options(BucketOptions):
        name: str = "k_orq"
        levels: int = Field(3, ge=2, le=256, description="Number of levels.")
        effective_workers: float | None = Field(None, ge=1, description="K of bias^2 + variance / K; null takes the number of workers.")
        sweeps: int = Field(20, ge=1, le=200, description="Sweeps of coordinate descent over all levels.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.base = self.sent = options.levels
        self.weight = float(self.effective_workers)

    @property
    def effective_workers(self) -> float:
        return float(self.options.effective_workers or max(1, self.workers))

    @property
    def label(self) -> str:
        return self.tag(f"k-orq-{self.base}")

    def find(self, rows: Tensor) -> Tensor:
        ordered = sort_rows(rows)
        return free_ends(ordered, self._start(rows, ordered), self.weight, self.options.sweeps).value.float()

    def _start(self, rows: Tensor, ordered: SortedRows) -> Cuts:
        """BinGrad-pb's pair outside and evenly spaced ranks between: below ||v||^2 in error from the first sweep on."""
        ends = symmetric_ends(rows, ordered)
        low, high = ends.lo[:, :1], ends.hi[:, 1:] - 1
        share = torch.arange(1, self.base - 1, dtype=torch.float64, device=rows.device) / (self.base - 1)
        inner = at_positions(ordered, low + ((high - low) * share).round().long())
        return Cuts(*(torch.cat((e[:, :1], i, e[:, 1:]), 1) for e, i in zip(ends, inner, strict=True)))
