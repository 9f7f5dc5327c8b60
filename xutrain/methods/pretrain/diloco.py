"""DiLoCo (arXiv 2311.08105): torch's SGD(lr 0.7, momentum 0.9, Nesterov) on the averaged displacement itself, not divided by gamma.

    g = mean_i (x_t - x^i);   u <- momentum u + g;   x_{t+1} = x_t - lr (g + momentum u)

``nesterov: false`` is heavy ball: x_{t+1} = x_t - lr u.

Limits: lr = 1, momentum = 0 is plain averaging.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions
from xutrain.registry import method


@method("pretrain", "diloco", paper="2311.08105", summary="baseline: Nesterov momentum on the averaged displacement")
class DiLoCo(LocalSteps):
    divided = False

    class Options(RoundOptions):
        lr: float = Field(0.7, gt=0, le=1e3, description="outer learning rate")
        momentum: float = Field(0.9, ge=0, lt=1, description="outer momentum over rounds")
        nesterov: bool = Field(True, description="Nesterov's form, as published; else heavy ball")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"u": torch.zeros_like(x)}

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        o = self.options
        u = memory["u"].mul_(o.momentum).add_(delta)
        x.add_(delta.add_(u, alpha=o.momentum) if o.nesterov else u, alpha=-o.lr)
