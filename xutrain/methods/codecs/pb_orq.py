"""ORQ with free outer levels: the multi-level form of BinGrad-pb. Beyond the paper."""

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
