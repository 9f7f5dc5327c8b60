"""DSM: distributed sign momentum with local steps (arXiv 2411.17866, algorithm as in the authors' program).

    D = (1/n) sum_i (x_t - x^i) / gamma,    c = beta1 m_t + (1 - beta1) D
    x_{t+1} = (1 - eta gamma lambda) x_t - eta gamma sign(c)
    m_{t+1} = beta2 m_t + (1 - beta2) D

x^i is where local steps took worker i from x_t, gamma their last learning rate (option ``gamma``); m_0 = 0.

Limits: one local SGD step is Lion(lr = eta gamma) on the averaged gradient; beta1 = beta2 = 0 is signed Lookahead.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.pretrain.signs import SignOptions, SignSteps
from xutrain.registry import method


def sign_momentum(delta: Tensor, momentum: Tensor, beta1: float, beta2: float) -> Tensor:
    """c of this round; ``momentum`` becomes that of the next round, in place."""
    c = torch.lerp(delta, momentum, beta1)
    momentum.mul_(beta2).add_(delta, alpha=1 - beta2)
    return c


@method("pretrain", "dsm", paper="2411.17866", summary="distributed sign momentum: a Lion step on the averaged displacement of local steps")
class DSM(SignSteps):
    class Options(SignOptions):
        beta1: float = Field(0.95, ge=0, lt=1, description="weight of the momentum in the sign")
        beta2: float = Field(0.98, ge=0, lt=1, description="momentum over rounds; it remembers 1 / (1 - beta2) of them")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(x)}

    def direction(self, delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        return sign_momentum(delta, memory["m"], self.options.beta1, self.options.beta2)

    def notes(self) -> list[str]:
        rounds = self.setup.total_steps // self.options.local_steps
        horizon = 1 / (1 - self.options.beta2)
        if horizon <= max(2.0, 0.05 * rounds):
            return super().notes()
        wanted = max(2.0, 0.015 * rounds)
        advice = f"for so short a run try method.beta2={1 - 1 / wanted:.2g} and a little less for method.beta1"
        return [*super().notes(), f"beta2={self.options.beta2:g} remembers {horizon:.3g} rounds of only {rounds}: more than 5%; {advice}"]
