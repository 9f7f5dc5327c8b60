"""BinGrad-pb: one bit, unbiased inside two levels and clipped outside them (arXiv 2002.11082).

    n b = sum_{|v| > b} |v|      (C4)
    |v| <= b:  Q(v) = b with probability (v + b) / (2 b), else -b;      |v| > b:  Q(v) = b sign(v)

v are the n elements of a bucket; b, where the two sides of (C4) cross, is sent for it. ``symmetric: false`` has two free levels instead:
sum_{inside} (v - b_-) = 2 sum_{v > b_+} (v - b_+), and its mirror image.

Limits: unbiased where |v| <= b, biased beyond. Without ``clip`` and bf16 levels, elements of one magnitude come back exactly.
``symmetric: false`` is pb-ORQ with 2 levels, up to the number of sweeps.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.methods.codecs.search import free_ends, partially_biased, sort_rows, symmetric_ends
from xutrain.registry import codec

_SWEEPS = 12


@codec("bingrad_pb", paper="2002.11082", summary="one bit, partially biased: random rounding between two optimal levels")
class BinGradPB(ScalarCodec):
    """Levels -b and +b with n b = sum of |v| over |v| > b, equation (C4); one float per bucket.

    ``symmetric: false`` frees both levels (our reading of the general case): sum over the inside of (v - b_-) = 2 * sum over
    v > b_+ of (v - b_+) and its mirror image, solved in turn from the symmetric pair on; two floats per bucket.
    """

    random = True
    biased = True
    contractive = True
    base = 2

    class Options(BucketOptions):
        name: str = "bingrad_pb"
        symmetric: bool = Field(True, description="Levels -b and +b; false finds two free levels.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.sent = 1 if options.symmetric else 2

    @property
    def label(self) -> str:
        return self.tag("bingrad-pb" if self.options.symmetric else "bingrad-pb-asym")

    def find(self, rows: Tensor) -> Tensor:
        if self.options.symmetric:
            return partially_biased(rows).float()
        ordered = sort_rows(rows)
        return free_ends(ordered, symmetric_ends(rows, ordered), weight=1.0, sweeps=_SWEEPS).value.float()

    def table(self, numbers: Tensor) -> Tensor:
        return torch.cat((-numbers, numbers), 1) if self.options.symmetric else numbers
