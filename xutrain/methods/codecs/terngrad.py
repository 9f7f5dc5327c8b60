"""TernGrad: random rounding onto -M, 0 and M. A baseline.

    Q(v_i) = sign(v_i) M with probability |v_i| / M, else 0;   M = max |v_i|

v_i are the elements of a bucket, clipped first if ``clip`` is set; M is sent for it.

Limits: without ``clip`` and bf16 levels it is unbiased, and elements of one magnitude come back exactly. It is QSGD with 3 levels
and ``norm: max``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.registry import codec


@codec("terngrad", summary="baseline: ternary, -max, 0 and max; clip 2.5 as its authors use it")
class TernGrad(ScalarCodec):
    """M = max |v| of the bucket, after clipping if ``clip`` is set (2.5 in its authors' experiments); one float per bucket."""

    random = True
    keeps_range = True
    base = 3
    sent = 1

    class Options(BucketOptions):
        name: str = "terngrad"

    def find(self, rows: Tensor) -> Tensor:
        return rows.abs().amax(1, keepdim=True)

    def table(self, numbers: Tensor) -> Tensor:
        return torch.cat((-numbers, torch.zeros_like(numbers), numbers), 1)
