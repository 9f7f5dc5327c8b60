"""SlowMo (arXiv 1910.00643): slow momentum over rounds of local steps.

    u <- beta u + D;   x_{t+1} = x_t - alpha gamma u,   D = (1/n) sum_i (x_t - x^i) / gamma

With m = (1 - beta) u it is the exponential average x - eta gamma m, alpha = eta (1 - beta). fairscale advises beta among 0, 0.1,
0.2, 0.4, 0.6; the official example of DSM uses alpha = 1, beta = 0.2.

``clip`` (a flag of the program of arXiv 2411.17866) bounds one vector of the step, ``clip_where``. displacement: gamma D, what
the workers moved. before: u of the last round, before D is added. after: u of this round, which is kept as it was clipped.
update: u in the step only; what is kept is not clipped.

Limits: beta = 0 is Lookahead(alpha); beta = 0 and alpha = 1 is plain averaging (Local AdamW).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.replica import clip_norm
from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions
from xutrain.registry import method


@method("pretrain", "slowmo", paper="1910.00643", summary="baseline: slow momentum on the averaged displacement")
class SlowMo(LocalSteps):
    class Options(RoundOptions):
        alpha: float = Field(1.0, gt=0, le=1e3, description="slow learning rate")
        beta: float = Field(0.2, ge=0, lt=1, description="slow momentum over rounds")
        clip: float | None = Field(None, gt=0, description="clip one vector of the step to this size; null: never")
        clip_where: Literal["displacement", "before", "after", "update"] = Field("displacement", description="which vector: see the card")
        clip_by: Literal["max", "l2"] = Field("max", description="max: every coordinate by itself; l2: the norm of each tensor")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"u": torch.zeros_like(x)}

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        o, u = self.options, memory["u"]
        if o.clip_where == "before":
            self._clip(u)
        if o.clip_where == "displacement":
            self._clip(delta, 1 / gamma)
        u.mul_(o.beta).add_(delta)
        if o.clip_where == "after":
            self._clip(u)
        x.add_(self._clip(u.clone()) if o.clip_where == "update" else u, alpha=-o.alpha * gamma)

    def _clip(self, vector: Tensor, unit: float = 1.0) -> Tensor:
        """``vector`` clipped in place, ``clip`` being in units of ``unit``."""
        if self.options.clip is None:
            return vector
        limit = self.options.clip * unit
        if self.options.clip_by == "max":
            return vector.clamp_(-limit, limit)
        for part in self.setup.layout:
            clip_norm(vector[part.start : part.stop], limit)
        return vector
