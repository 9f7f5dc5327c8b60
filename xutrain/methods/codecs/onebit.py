"""1-bit SGD's quantizer: threshold zero, two conditional means. A baseline."""

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
