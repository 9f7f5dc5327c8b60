"""ORQ-s: unbiased random rounding onto levels that minimise the bucket's squared error (arXiv 2002.11082).

    b_0 = min v,   b_{s-1} = max v;   Q(v) = b_{k+1} with probability (v - b_k) / (b_{k+1} - b_k), else b_k
    between b_l and b_r:  the q-th smallest of the m elements in [b_l, b_r],   q = clamp(ceil(m - A / R), 1, m)      (C3)
    A = sum of v - b_l over them,   R = b_r - b_l

v are the elements of a bucket; (C3) is the exact minimiser of sum (b_{k+1} - v) (v - b_k) for given neighbours. Bisection sets
s = 2^K + 1 levels, the middle one first; ``refine`` repeats (C3) with the neighbours as they are now.

Limits: without ``clip`` and bf16 levels it is unbiased, and lossless where every distinct value has a level (a constant bucket, at
most two values). 3 levels are the exact optimum between minimum and maximum; ``refine`` never raises the error.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from xutrain.methods.codecs.scalar import BucketOptions, ScalarCodec
from xutrain.methods.codecs.search import evenly, greedy, greedy_levels, sort_rows, sweep
from xutrain.registry import codec

_GREEDY = tuple(2**k + 1 for k in range(1, 8))  # 3, 5, 9, ... 129


@codec("orq", paper="2002.11082", summary="optimal levels per bucket, unbiased random rounding")
class ORQ(ScalarCodec):
    """Optimal random quantization.

    The outer levels are the extremes of the bucket; every inner one is the exact minimiser between its neighbours, equation
    (C3), found by bisection. ``refine`` repeats (C3) with the neighbours as they are now (coordinate descent, ours), and
    allows any number of levels, which then start at evenly spaced ranks. Every distinct value having a level is lossless.
    """

    random = True
    keeps_range = True

    class Options(BucketOptions):
        name: str = "orq"
        refine: int | None = Field(None, ge=0, le=64, description="Sweeps of coordinate descent after the bisection; beyond the paper.")
        levels: int = Field(9, ge=2, le=256, description="Number of levels, 2^K + 1: 3, 5, 9, 17, 33, 65 or 129.")

        @field_validator("levels")
        @classmethod
        def _bisectable(cls, value: int, info: ValidationInfo) -> int:
            if value not in _GREEDY and not info.data.get("refine"):
                allowed = ", ".join(map(str, _GREEDY))
                raise ValueError(f"must be 2^K + 1, one of {allowed}; `refine: 8` allows any number, beyond the paper")
            return value

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.base = self.sent = options.levels

    @property
    def label(self) -> str:
        return self.tag(f"orq-{self.base}" + (f"-refine{self.options.refine}" if self.options.refine else ""))

    def find(self, rows: Tensor) -> Tensor:
        if self.base in _GREEDY and not self.options.refine:
            return greedy_levels(rows, self.base)
        ordered = sort_rows(rows)
        cuts = (greedy if self.base in _GREEDY else evenly)(ordered, self.base)
        for _ in range(self.options.refine or 0):
            if not sweep(ordered, cuts):
                break
        return cuts.value.float()
