"""CS: continuous search with a Gaussian, u ~ N(mu, (A A')^-1), of which mu is learnt and A may be; and ``frozen``, which never learns.

With z = u - mu and Lambda = A A' (arXiv 2203.06338 and its public code; gradients in closed form):

    gaussian:   grad_mu log P = Lambda z                                                                      (1)
                grad_A  log P = (Lambda^-1 - z z') A                                                          (2)
    frozen:     u ~ N(0, init_std^2 I) in every round

mu starts at 0, the middle of all ranges, and is clamped to [-1/2, 1/2]; it ascends sum (r - r~) grad log P (``reinforce.py``).
Initial spread: the code passes sqrt(85) I as precision, so its samples have 85^(-1/4) = 0.329; read as A it would be
85^(-1/2) = 0.108, our default. ``cov``: fixed A; ``diag``, a log-deviation per coordinate; ``chol``, lower-triangular A with a
softplus diagonal. ``natural_gradient`` replaces Adam by mu <- mu + eta sum (r - r~) z / n, so that coordinates without influence
stay put (ours; Wierstra et al., JMLR 2014).

Limits: Adam's lr 0 with ``cov: fixed`` is ``frozen``; with init_std 0 besides it is ``fixed``, the middle of all ranges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import State
from xutrain.methods.federate.search.base import Agent, Noise
from xutrain.registry import Named, agent


class AdamOptions(Named):
    """Options of the ascent step."""

    lr: float = Field(0.01, ge=0, description="Learning rate of the agent's Adam.")
    beta1: float = Field(0.7, ge=0, lt=1, description="Decay of its first moment.")
    beta2: float = Field(0.7, ge=0, lt=1, description="Decay of its second moment.")


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x)."""
    return torch.nn.functional.softplus(x)


def inverse_softplus(y: float) -> float:
    """x with softplus(x) = y > 0."""
    return y + math.log(-math.expm1(-y))


def score_mean(precision: Tensor, z: Tensor) -> Tensor:
    """(1): Lambda z, shape (D,)."""
    return precision @ z


def score_factor(factor: Tensor, z: Tensor) -> Tensor:
    """(2): (Lambda^-1 - z z') A, shape (D, D)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(factor @ factor.T))
    return (inverse - torch.outer(z, z)) @ factor


@agent("gaussian", paper="2203.06338", summary="continuous search: a Gaussian whose mean is learnt (CS)", aliases=("cs",))
class Gaussian(Agent):
    """The agent; state ``params``: mean (D,), and log_std (D,) or raw (D, D) where the covariance is learnt."""

    class Options(AdamOptions):
        name: Literal["gaussian"] = "gaussian"
        cov: Literal["fixed", "diag", "chol"] = Field("fixed", description="What of the covariance is learnt.")
        init_std: float = Field(0.108, ge=0, le=10, description="Initial standard deviation of u; the public code's CS has 0.329.")
        clamp: float | None = Field(0.5, gt=0, description="The mean stays in [-x, x]; null: anywhere.")
        natural_gradient: bool = Field(False, description="Step of mu along the natural gradient instead of Adam (ours).")
        natural_lr: float = Field(1.0, ge=0, description="eta of that step.")

    options: Any

    def start(self) -> State:
        params = {"mean": torch.zeros(self.space.dim, dtype=torch.float64)}
        std = self.options.init_std
        if self.options.cov == "diag":
            params["log_std"] = torch.full((self.space.dim,), math.log(max(std, 1e-12)), dtype=torch.float64)
        elif self.options.cov == "chol":
            params["raw"] = torch.diag(torch.full((self.space.dim,), inverse_softplus(1 / max(std, 1e-12)), dtype=torch.float64))
        return {"params": params, "adam": {}}

    def factor(self, state: State) -> Tensor:
        """A, lower-triangular of shape (D, D): the precision is A A'."""
        raw = state["params"]["raw"]
        return torch.tril(raw, -1) + torch.diag(softplus(raw.diagonal()))

    def std(self, state: State) -> Tensor:
        """Deviations of independent coordinates, shape (D,)."""
        held = state["params"].get("log_std")
        return torch.full((self.space.dim,), self.options.init_std, dtype=torch.float64) if held is None else held.exp()

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        z = noise.normal(self.space.dim)
        mean = state["params"]["mean"]
        if self.options.cov == "chol":
            return mean + torch.linalg.solve_triangular(self.factor(state).T, z[:, None], upper=True)[:, 0], {}
        return mean + self.std(state) * z, {}

    def gradient(self, state: State, samples: Sequence[State], advantages: Tensor) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(value) for name, value in state["params"].items()}
        chol = self.options.cov == "chol"
        factor = self.factor(state) if chol else None
        variance = self.std(state) ** 2
        for sample, weight in zip(samples, advantages, strict=True):
            z = sample["u"] - state["params"]["mean"]
            if factor is not None:
                total["mean"] += weight * score_mean(factor @ factor.T, z)
                slope = torch.tril(score_factor(factor, z))
                diagonal = slope.diagonal() * torch.sigmoid(state["params"]["raw"].diagonal())
                total["raw"] += weight[0] * (torch.tril(slope, -1) + torch.diag(diagonal))
            else:
                total["mean"] += weight * torch.where(variance > 0, z / variance.clamp(min=1e-300), 0.0)
                if "log_std" in total:
                    total["log_std"] += weight * (z**2 / variance - 1)
        return total

    def improve(self, state: State, samples: Sequence[State], advantages: Tensor, adam: State | None = None) -> None:
        if not self.options.natural_gradient:
            super().improve(state, samples, advantages, adam)
            return
        mean = state["params"]["mean"]
        step = sum(w * (s["u"] - mean) for s, w in zip(samples, advantages, strict=True)) / len(samples)
        mean.add_(step, alpha=self.options.natural_lr)
        self.project(state)

    def project(self, state: State) -> None:
        if self.options.clamp is not None:
            state["params"]["mean"].clamp_(-self.options.clamp, self.options.clamp)
        if "log_std" in state["params"]:
            state["params"]["log_std"].clamp_(math.log(1e-3), math.log(0.5))

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        mean = state["params"]["mean"]
        if self.options.cov != "chol":
            return mean.clone(), self.std(state)
        factor = self.factor(state)
        return mean.clone(), torch.cholesky_inverse(torch.linalg.cholesky(factor @ factor.T)).diagonal().sqrt()


@agent("frozen", summary="control: the same draws, never learnt from (does the agent learn at all?)")
class Frozen(Gaussian):
    """A Gaussian at the middle of all ranges, for ever."""

    learns: ClassVar[bool] = False

    class Options(Named):
        name: Literal["frozen"] = "frozen"
        init_std: float = Field(0.108, ge=0, le=10, description="Standard deviation of u.")

    def start(self) -> State:
        return {"params": {"mean": torch.zeros(self.space.dim, dtype=torch.float64)}, "adam": {}}

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        return state["params"]["mean"] + self.options.init_std * noise.normal(self.space.dim), {}

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        return state["params"]["mean"].clone(), self.std(state)
