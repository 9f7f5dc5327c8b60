"""Levels at evenly spaced quantiles. A baseline.

    b_k = v_(h) at rank h = k (n - 1) / (s - 1), linear between ranks,   k = 0 .. s-1
    Q(v) = b_{k+1} with probability (v - b_k) / (b_{k+1} - b_k), else b_k,   for b_k <= v <= b_{k+1}

v_(0) <= ... <= v_(n-1) are the elements of a bucket, s is ``levels``; all levels are sent.

Limits: without ``clip`` and bf16 levels it is unbiased, and a bucket of s elements, or of at most two distinct values, comes back
exactly. 2 levels: ``linear`` with 2.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.methods.codecs.search import sort_rows
from xutrain.registry import codec


@codec("quantile", summary="baseline: levels split the bucket into equally many elements", aliases=("cdf",))
class Quantile(ScalarCodec):
    """Level k is the empirical quantile k / (levels - 1), interpolated linearly; the ends are minimum and maximum."""

    random = True
    keeps_range = True

    class Options(BucketOptions):
        name: str = "quantile"
        levels: int = Field(5, ge=2, le=256, description="Number of levels.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.base = self.sent = options.levels

    @property
    def label(self) -> str:
        return self.tag(f"quantile-{self.base}")

    def find(self, rows: Tensor) -> Tensor:
        ordered = sort_rows(rows)
        rank = torch.arange(self.base, device=rows.device, dtype=torch.float64) * (ordered.n - 1) / (self.base - 1)
        below = rank.floor().long().clamp(max=ordered.n - 1)
        above = (below + 1).clamp(max=ordered.n - 1)
        low, high = ordered.values[:, below].double(), ordered.values[:, above].double()
        return (low + (high - low) * (rank - below)).float()
