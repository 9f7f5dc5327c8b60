"""SlowMo (arXiv 1910.00643): u <- beta u + D;  x_{t+1} = x_t - alpha gamma u.

Limits: beta = 0 is Lookahead(alpha); beta = 0 and alpha = 1 is plain averaging (Local AdamW). With m = (1 - beta) u it is the
exponential average x - eta gamma m, alpha = eta (1 - beta). fairscale advises beta among 0, 0.1, 0.2, 0.4, 0.6; the official
example of DSM uses alpha = 1, beta = 0.2.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions
from xutrain.registry import method


@method("pretrain", "slowmo", paper="1910.00643", summary="baseline: slow momentum on the averaged displacement")
class SlowMo(LocalSteps):
    class Options(RoundOptions):
        alpha: float = Field(1.0, gt=0, le=1e3, description="slow learning rate")
        beta: float = Field(0.2, ge=0, lt=1, description="slow momentum over rounds")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"u": torch.zeros_like(x)}

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        memory["u"].mul_(self.options.beta).add_(delta)
        x.add_(memory["u"], alpha=-self.options.alpha * gamma)
