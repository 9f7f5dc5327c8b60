"""QSGD: evenly spaced levels between -N and N, N the bucket's norm. A baseline.

    Q(v_i) = sign(v_i) (j + 1) N / u with probability u |v_i| / N - j, else sign(v_i) j N / u;   j = floor(u |v_i| / N)
    N = max |v_i|   (norm: max)     or     N = ||v||_2   (norm: l2);   u = (levels - 1) / 2

v_i are the elements of a bucket; N is sent for it.

Limits: without ``clip`` and bf16 levels it is unbiased, and with ``norm: max`` elements of one magnitude come back exactly.
``norm: max`` with 3 levels is TernGrad.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from xutrain.methods.codecs.rounding import row_sums
from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.registry import codec


@codec("qsgd", summary="baseline: evenly spaced levels, scaled by the maximum or by the L2 norm")
class QSGD(ScalarCodec):
    """Levels N j / u for j = -u .. u with u = (levels - 1) / 2; one float per bucket.

    ``norm: l2`` is the original; ``max`` is what most code does, and with 3 levels it is TernGrad.
    """

    random = True
    keeps_range = True

    class Options(BucketOptions):
        name: str = "qsgd"
        levels: int = Field(5, ge=3, le=255, description="Number of levels, odd: 3, 5, 7, ...")
        norm: Literal["max", "l2"] = Field("max", description="Scale of the outer levels: largest magnitude, or L2 norm of the bucket.")

        @field_validator("levels")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError(f"must be odd, for instance {value - 1 or 3} or {value + 1}")
            return value

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.base = options.levels

    @property
    def label(self) -> str:
        return self.tag(f"qsgd-{'l2-' if self.options.norm == 'l2' else ''}{self.base}")

    def find(self, rows: Tensor) -> Tensor:
        if self.options.norm == "max":
            return rows.abs().amax(1, keepdim=True)
        return row_sums(rows.double().square()).sqrt().clamp(max=torch.finfo(torch.float32).max).float()

    def table(self, numbers: Tensor) -> Tensor:
        u = self.base // 2
        return numbers * (torch.arange(-u, u + 1, device=numbers.device, dtype=torch.float32) / u)
