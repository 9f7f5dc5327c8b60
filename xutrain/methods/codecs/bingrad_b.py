"""BinGrad-b: one bit, deterministic, two conditional means (arXiv 2002.11082).

    b_- = mean {v < t},   b_+ = mean {v >= t};   Q(v) = b_+ where v >= t, else b_-

v are the elements of a bucket; two floats are sent for it. The threshold t is the mean of v, half-way between the levels (the optimal
condition) where the distribution is symmetric, or with ``threshold: lloyd`` the split of least error.

Limits: biased. Without ``clip`` and bf16 levels, at most two distinct values (a constant bucket too) come back exactly. A bucket
with mean 0 is quantized as by ``onebit`` (``threshold: mean``).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.codecs.rounding import row_sums
from xutrain.methods.codecs.scalar import BucketOptions
from xutrain.methods.codecs.search import sort_rows
from xutrain.methods.codecs.two_means import TwoMeans
from xutrain.registry import codec


@codec("bingrad_b", paper="2002.11082", summary="one bit, biased: threshold at the mean, levels are the two conditional means")
class BinGradB(TwoMeans):
    """Optimal condition: the threshold is half-way between the levels, the levels are the means of their sides.

    ``threshold: mean`` is the paper's one-pass rule, exact for symmetric distributions; ``lloyd`` is the exact two-level
    optimum (one-dimensional 2-means over the sorted bucket).
    """

    class Options(BucketOptions):
        name: str = "bingrad_b"
        threshold: Literal["mean", "lloyd"] = Field("mean", description="Split at the mean, or at the exact optimum of two levels.")

    @property
    def label(self) -> str:
        return self.tag("bingrad-b" + ("" if self.options.threshold == "mean" else "-lloyd"))

    def threshold(self, rows: Tensor) -> Tensor:
        n = rows.shape[1]
        if self.options.threshold == "mean":
            exact = row_sums(rows) / n
            near = exact.float()
            # rounded up, so that comparing in float32 is comparing with the exact mean
            return torch.where(near.double() < exact, torch.nextafter(near, torch.full_like(near, torch.inf)), near)
        ordered = sort_rows(rows)
        if n == 1:
            return ordered.values
        # j elements below the split: maximise S_j^2 / j + (S_n - S_j)^2 / (n - j) between different neighbours
        count = torch.arange(1, n, dtype=torch.float64, device=rows.device)
        total = ordered.prefix[:, -1:]
        centred = ordered.prefix[:, 1:-1] - total * (count / n)  # the split is the same about the mean, and better conditioned
        gain = centred.square() * (1 / count + 1 / (n - count))
        gain[ordered.values[:, 1:] == ordered.values[:, :-1]] = -1.0
        best = gain.argmax(1, keepdim=True) + 1
        best[ordered.values[:, :1] == ordered.values[:, -1:]] = 0  # constant: all on one side
        return ordered.values.gather(1, best)
