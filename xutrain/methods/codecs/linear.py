"""Evenly spaced levels from the minimum to the maximum. A baseline.

    b_k = min v + k (max v - min v) / (s - 1),   k = 0 .. s-1
    Q(v) = b_{k+1} with probability (v - b_k) / (b_{k+1} - b_k), else b_k,   for b_k <= v <= b_{k+1}

v are the elements of a bucket, s is ``levels``; minimum and maximum are sent.

Limits: without ``clip`` and bf16 levels it is unbiased, and at most two distinct values come back exactly. 2 levels: ``quantile``
with 2.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.registry import codec


@codec("linear", summary="baseline: evenly spaced levels from minimum to maximum")
class Linear(ScalarCodec):
    """Level k is min + k (max - min) / (levels - 1); two floats per bucket."""

    random = True
    keeps_range = True
    sent = 2

    class Options(BucketOptions):
        name: str = "linear"
        levels: int = Field(5, ge=2, le=256, description="Number of levels.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.base = options.levels

    @property
    def label(self) -> str:
        return self.tag(f"linear-{self.base}")

    def find(self, rows: Tensor) -> Tensor:
        return torch.cat((rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)), 1)

    def table(self, numbers: Tensor) -> Tensor:
        low, high = numbers[:, :1].double(), numbers[:, 1:].double()
        share = torch.arange(self.base, device=numbers.device, dtype=torch.float64) / (self.base - 1)
        return torch.where(share < 1, low + (high - low) * share, high).float()
