"""ORQ with free outer levels: the multi-level form of BinGrad-pb. Beyond the paper.

    least  sum (v - w)^2 + (b_{k+1} - w) (w - b_k),   w = v clamped to [b_0, b_{s-1}],  b_k <= w <= b_{k+1}
    top:   sum_{last cell} (v - b_{s-2}) = 2 sum_{v > b_{s-1}} (v - b_{s-1});   bottom: its mirror image;   between: (C3)

v are the elements of a bucket, b_0 .. b_{s-1} its levels; the sum is bias^2 + variance of one message.

Limits: K-aware ORQ with K = 1; 2 levels: BinGrad-pb with free levels. Without ``clip`` and bf16 levels, a constant bucket comes back
exactly.
"""

from __future__ import annotations

from pydantic import Field

from xutrain.methods.codecs.k_orq import KORQ
from xutrain.methods.codecs.scalar import BucketOptions
from xutrain.registry import codec


@codec("pb_orq", summary="beyond the paper: ORQ with free outer levels, least squared error of one message, partially biased")
class PBORQ(KORQ):
    """K-aware levels with K = 1, so bias^2 + variance of a single message is least.

    It starts below ||v||^2 and never rises, so it is contractive and error feedback is sound; ORQ-3 and TernGrad are not.
    """

    contractive = True

    class Options(BucketOptions):
        name: str = "pb_orq"
        levels: int = Field(3, ge=2, le=256, description="Number of levels, any from 2 on; 2 is BinGrad-pb with free levels.")
        sweeps: int = Field(20, ge=1, le=200, description="Sweeps of coordinate descent over all levels.")

    @property
    def effective_workers(self) -> float:
        return 1.0

    @property
    def label(self) -> str:
        return self.tag(f"pb-orq-{self.base}")
