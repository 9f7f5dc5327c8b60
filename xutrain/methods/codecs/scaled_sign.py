"""Scaled sign: the sign times the mean magnitude. A baseline."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.rounding import at_least
from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.registry import codec


@codec("scaled_sign", summary="baseline: signs times the mean magnitude of the bucket")
class ScaledSign(ScalarCodec):
    """Levels -m and +m, m = mean |v|; bit 1 where v >= 0. The error is ||v||^2 - n m^2."""

    biased = True
    contractive = True
    base = 2
    sent = 1

    class Options(BucketOptions):
        name: str = "scaled_sign"
        scope: Literal["bucket", "global"] = Field("bucket", description="What shares one magnitude: a bucket, or the whole vector.")

    @property
    def label(self) -> str:
        return self.tag("scaled-sign" + ("" if self.options.scope == "bucket" else "-global"))

    def bucket(self, length: int) -> int:
        return length if self.options.scope == "global" else int(self.options.bucket)

    def find(self, rows: Tensor) -> Tensor:
        return (rows.abs().sum(1, keepdim=True, dtype=torch.float64) / rows.shape[1]).float()

    def table(self, numbers: Tensor) -> Tensor:
        return torch.cat((-numbers, numbers), 1)

    def quantise(self, rows: Tensor, uniforms: Tensor | None, out: Tensor) -> Tensor:
        at_least(rows, 0.0, out)
        return self.as_sent(self.find(rows))
