"""Global AdamW: an AdamW step on the pseudo-gradient (FedOpt's server step, arXiv 2003.00295), a baseline of arXiv 2411.17866.

    m <- b1 m + (1 - b1) D;   v <- b2 v + (1 - b2) D^2;   D = (1/n) sum_i (x_t - x^i) / gamma
    x_{t+1} = (1 - eta gamma lambda) x_t - eta gamma (m / (1 - b1^r)) / (sqrt(v / (1 - b2^r)) + eps),   r = 1, 2, ... rounds

Differs from the authors' program, whose bias corrections count steps instead of rounds.

Limits: one local step of plain SGD is AdamW(lr = eta gamma, decay on all parameters) on the averaged gradient; b1 = b2 = 0 and
eps -> 0 is signed Lookahead.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.base_optimizers import shrink
from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions
from xutrain.registry import method


@method("pretrain", "global_adamw", paper="2003.00295", summary="baseline: an AdamW step on the averaged displacement")
class GlobalAdamW(LocalSteps):
    class Options(RoundOptions):
        eta: float = Field(1.0, gt=0, le=1e6, description="global rate")
        beta1: float = Field(0.9, ge=0, lt=1, description="first moment over rounds")
        beta2: float = Field(0.95, ge=0, lt=1, description="second moment over rounds")
        eps: float = Field(1e-8, gt=0, le=1, description="added to the root of the second moment")
        weight_decay: float = Field(0.1, ge=0, le=1e3, description="decay of the global step, on all parameters")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x), "rounds": x.new_zeros(1)}

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        o = self.options
        r = int(memory["rounds"].add_(1))
        memory["m"].lerp_(delta, 1 - o.beta1)
        memory["v"].mul_(o.beta2).addcmul_(delta, delta, value=1 - o.beta2)
        shrink(x, [(0, x.numel())], 1 - o.eta * gamma * o.weight_decay)
        root = memory["v"].sqrt().div_(math.sqrt(1 - o.beta2**r)).add_(o.eps)
        x.addcdiv_(memory["m"], root, value=-o.eta * gamma / (1 - o.beta1**r))
