"""Scaled sign: the sign times the mean magnitude. A baseline.

    Q(v_i) = m where v_i >= 0, else -m;   m = (1/n) sum |v_i|;   ||v - Q(v)||^2 = ||v||^2 - n m^2

v_i are the n elements that share one magnitude: of a bucket, of a tensor, or all (``scope``); m is sent for them.

Limits: biased. Without ``clip`` and bf16 levels, elements of one magnitude (a constant bucket too) come back exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.rounding import Draws, at_least, row_sums
from xutrain.methods.codecs.scalar import Block, BucketOptions, ScalarCodec
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
        scope: Literal["bucket", "tensor", "global"] = Field("bucket", description="What shares one magnitude: a bucket, a tensor, or all.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.per_tensor = options.scope == "tensor"

    @property
    def label(self) -> str:
        return self.tag("scaled-sign" + ("" if self.options.scope == "bucket" else f"-{self.options.scope}"))

    def bucket(self, length: int) -> int:
        return int(self.options.bucket) if self.options.scope == "bucket" else length

    def _buckets(self, length: int) -> int:
        return len(self.tensors(length)) if self.per_tensor else super()._buckets(length)

    def _blocks(self, vector: Tensor) -> Iterator[Block]:
        if not self.per_tensor:
            return super()._blocks(vector)
        return (Block(i, i + 1, part.start, part.stop, part.numel) for i, part in enumerate(self.tensors(vector.numel())))

    def find(self, rows: Tensor) -> Tensor:
        return (row_sums(rows.abs()) / rows.shape[1]).float()

    def table(self, numbers: Tensor) -> Tensor:
        return torch.cat((-numbers, numbers), 1)

    def quantise(self, rows: Tensor, draws: Draws | None, out: Tensor) -> Tensor:
        at_least(rows, 0.0, out)
        return self.as_sent(self.find(rows))
