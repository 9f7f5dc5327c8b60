"""1-bit SGD's quantizer: threshold zero, two conditional means. A baseline.

    b_- = mean {v < 0},   b_+ = mean {v >= 0};   Q(v) = b_+ where v >= 0, else b_-

v are the elements of a bucket; two floats are sent for it.

Limits: biased; a bucket of one sign becomes its mean. Without ``clip`` and bf16 levels, elements of one magnitude come back exactly.
On a bucket with mean 0 it is BinGrad-b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions
from xutrain.methods.codecs.two_means import TwoMeans
from xutrain.registry import codec


@codec("onebit", summary="baseline: one bit, threshold zero, levels are the two conditional means (1-bit SGD)")
class OneBit(TwoMeans):
    """Bit 1 where v >= 0; two floats per bucket. On data with mean zero it is BinGrad-b."""

    class Options(BucketOptions):
        name: str = "onebit"

    def threshold(self, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), 1, device=rows.device)
