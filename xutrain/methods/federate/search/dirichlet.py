"""Aggregation weights drawn from a Dirichlet law, beside the other coordinates' agent.

a ~ Dir(kappa), kappa = softplus(raw) + 1e-3 > 0, initially 5 a client; E a_k = kappa_k / K, Var a_k = E (1 - E) / (K + 1) with
K = sum kappa. Score (digamma psi), with a detached sample where the public code differentiates through it:

    d log P / d kappa_k = psi(K) - psi(kappa_k) + ln a_k                                                        (1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xutrain.methods.federate.base import State
from xutrain.methods.federate.search.base import Noise
from xutrain.methods.federate.search.gaussian import inverse_softplus, softplus
from xutrain.methods.federate.search.reinforce import adam_ascent

LEAST = 1e-3


def start(clients: int, concentration: float) -> State:
    """State before the first round."""
    raw = torch.full((clients,), inverse_softplus(max(concentration - LEAST, 1e-6)), dtype=torch.float64)
    return {"params": {"raw": raw}, "adam": {}}


def concentration(state: State) -> Tensor:
    """kappa, shape (K,)."""
    return softplus(state["params"]["raw"]) + LEAST


def draw(state: State, noise: Noise) -> Tensor:
    """a, float64 of shape (K,), summing to 1, no entry zero."""
    gamma = torch._standard_gamma(concentration(state), generator=noise.generator).clamp(min=1e-300)
    return (gamma / gamma.sum()).clamp(min=1e-300)


def score(kappa: Tensor, shares: Tensor) -> Tensor:
    """(1), shape (K,)."""
    return torch.digamma(kappa.sum()) - torch.digamma(kappa) + shares.log()


def improve(state: State, shares: Sequence[Tensor], advantages: Tensor, lr: float, beta1: float, beta2: float) -> None:
    """One ascent step on kappa's parameters; ``advantages`` has shape (n,)."""
    kappa = concentration(state)
    total = torch.zeros_like(kappa)
    for a, weight in zip(shares, advantages, strict=True):
        total += weight * score(kappa, a)
    gradient = {"raw": total * torch.sigmoid(state["params"]["raw"])}
    adam_ascent(state["params"], gradient, state["adam"], lr, beta1, beta2)


def moments(state: State) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a, each of shape (K,)."""
    kappa = concentration(state)
    mean = kappa / kappa.sum()
    return mean, (mean * (1 - mean) / (kappa.sum() + 1)).sqrt()
