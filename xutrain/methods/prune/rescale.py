"""Row rescaling (ours): after masking, one factor per output row that gives back what the row lost on average.

    alpha_i = sum_t g_t^2 Y_ti Y'_ti / sum_t g_t^2 Y'_ti^2,   Y = z W^T dense, Y' = z W'^T masked

minimises sum_t g_t^2 (Y_ti - alpha_i Y'_ti)^2. Clamped to [0.5, 2]. Limit: no weight dropped gives alpha = 1. The mask and
an n:m pattern stay; the factor is folded into the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.prune.base import ROLES, Chunk, Cut, Expert

LOWEST, HIGHEST = 0.5, 2.0
#: Fewer tokens than this say too little about a row.
MIN_TOKENS = 32


class RowScales:
    """Sums of Y Y' and Y'^2 over chunks, for one expert and its masks."""

    def __init__(self, dense: Expert, pruned: Expert) -> None:
        self.dense, self.pruned = dense, pruned
        wide = torch.promote_types(dense.gate.dtype, torch.float32)
        self.sums = {r: torch.zeros(2, dense.matrix(r).shape[0], dtype=wide, device=dense.gate.device) for r in ROLES}
        self.tokens = 0

    def add(self, chunk: Chunk) -> None:
        self.tokens += len(chunk.x)
        for role, total in self.sums.items():
            z = chunk.input(role) * chunk.g.unsqueeze(1)
            y, masked = ((z @ e.matrix(role).T.to(z.dtype)).to(total.dtype) for e in (self.dense, self.pruned))
            total[0] += (y * masked).sum(0)
            total[1] += masked.square().sum(0)

    def alpha(self, role: str) -> Tensor:
        """One factor per output row, (rows,)."""
        top, bottom = self.sums[role]
        seen = bottom > 0
        return torch.where(seen, top / torch.where(seen, bottom, 1.0), 1.0).clamp(LOWEST, HIGHEST)

    def cut(self, cut: Cut) -> Cut:
        """The same masks with rescaled weights; unchanged where too few tokens were seen."""
        if self.tokens < MIN_TOKENS:
            return cut
        return Cut(cut.masks, {r: self.pruned.matrix(r) * self.alpha(r).unsqueeze(1) for r in ROLES})
