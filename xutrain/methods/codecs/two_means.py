"""One bit by a threshold: the level of a side is the mean of the elements on it."""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.codecs.rounding import Draws, at_least, row_sums
from xutrain.methods.codecs.scalar import ScalarCodec


class TwoMeans(ScalarCodec):
    """A deterministic codec: bit 1 where v >= threshold, levels the two conditional means, two floats per bucket.

    The squared error is that of the bucket less n_i mean_i^2 of both sides, so it is below ||v||^2 for every v != 0.
    """

    biased = True
    contractive = True
    base = 2
    sent = 2

    def threshold(self, rows: Tensor) -> Tensor:
        """Thresholds (B, 1), float32, of rows (B, n)."""
        raise NotImplementedError

    def find(self, rows: Tensor) -> Tensor:
        return self._split(rows, torch.empty_like(rows, dtype=torch.uint8))

    def quantise(self, rows: Tensor, draws: Draws | None, out: Tensor) -> Tensor:
        return self.as_sent(self._split(rows, out))

    def _split(self, rows: Tensor, out: Tensor) -> Tensor:
        at_least(rows, self.threshold(rows), out)
        many = out.sum(1, keepdim=True, dtype=torch.int32)
        few = rows.shape[1] - many
        upper = rows * out.float()
        high = row_sums(upper) / many
        low = row_sums(rows - upper) / few
        return torch.cat((torch.where(few > 0, low, high), torch.where(many > 0, high, low)), 1).float()
