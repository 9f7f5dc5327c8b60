"""CS-MLP: a small network moves the Gaussian; only the network's weights theta are learnt.

    (d_mu, d_A) = tanh(MLP(mu_{q-1}, vec A_{q-1})) / 100                                                      (1)
    mu_q = clamp(mu_{q-1} + d_mu),   A_q = A_{q-1} + d_A,   u_q ~ N(mu_q, (A_q A_q')^-1)                        (2)
    theta ascends sum (r_t - r~) log P(u_t)

Linear D + D^2 -> 256, ReLU, 256 -> 256, ReLU, 256 -> D + D^2; mu_0 = 1e-7, A_0 = I / init_std + 1e-7. One round moves a coordinate
by 0.01 at most. The public code keeps mu_q attached to all earlier graphs, which no current torch runs. Sound form (ours): the
inputs (mu_{t-1}, A_{t-1}) of a sample are remembered; an update runs the present network on them. No graph survives a round. With
the public agent lr of 0.01 the means saturate at the clamp; 1e-3 and a last layer of zeros, our defaults, learn.

Limits: a last layer of zeros moves nothing, so with lr 0 it is ``frozen`` up to the 1e-7 of the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import State
from xutrain.methods.federate.search.base import Agent, Noise
from xutrain.methods.federate.search.gaussian import AdamOptions
from xutrain.registry import agent

LAYERS = 3


def log_density(u: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """log N(u; mu, (A A')^-1) up to a constant, for a square A."""
    return torch.linalg.slogdet(factor)[1] - 0.5 * (factor.T @ (u - mean)).square().sum()


@agent("mlp", paper="2203.06338", summary="continuous search: a network moves the Gaussian (CS-MLP)", aliases=("cs_mlp", "drl"))
class Mlp(Agent):
    """The agent; state ``params``: w1, b1, ..., w3, b3; ``mean`` and ``factor`` are the network's next input."""

    class Options(AdamOptions):
        name: Literal["mlp"] = "mlp"
        lr: float = Field(1e-3, ge=0, description="Learning rate of the network's Adam; the public code has 0.01, which saturates.")
        hidden: int = Field(256, ge=1, le=10**5, description="Width of the two hidden layers.")
        zero_init_head: bool = Field(True, description="The last layer starts at zero, so the first moves are none; false: torch's.")
        init_std: float = Field(0.108, gt=0, le=10, description="Initial standard deviation of u.")
        clamp: float | None = Field(0.5, gt=0, description="The mean stays in [-x, x]; null: anywhere. The public code has 1.")
        step: float = Field(0.01, gt=0, description="Largest move of a parameter in a round.")

    options: Any

    def start(self) -> State:
        dim, hidden = self.space.dim, self.options.hidden
        wide = dim + dim * dim
        generator = self.key.fold(stream="mlp").generator()
        params: dict[str, Tensor] = {}
        for i, (inputs, outputs) in enumerate(((wide, hidden), (hidden, hidden), (hidden, wide)), start=1):
            bound = 1 / math.sqrt(inputs)  # torch's default for linear layers
            params[f"w{i}"] = (torch.rand(outputs, inputs, generator=generator, dtype=torch.float64) * 2 - 1) * bound
            params[f"b{i}"] = (torch.rand(outputs, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        if self.options.zero_init_head:
            params[f"w{LAYERS}"].zero_()
            params[f"b{LAYERS}"].zero_()
        mean = torch.full((dim,), 1e-7, dtype=torch.float64)
        factor = torch.eye(dim, dtype=torch.float64) / self.options.init_std + 1e-7
        return {"params": params, "adam": {}, "mean": mean, "factor": factor}

    def moved(self, params: dict[str, Tensor], mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """(1) and (2): the law after one step from (mean, factor)."""
        x = torch.cat([mean, factor.reshape(-1)])
        for i in range(1, LAYERS + 1):
            x = params[f"w{i}"] @ x + params[f"b{i}"]
            x = torch.relu(x) if i < LAYERS else torch.tanh(x) * self.options.step
        dim = self.space.dim
        mean = mean + x[:dim]
        if self.options.clamp is not None:
            mean = mean.clamp(-self.options.clamp, self.options.clamp)
        return mean, factor + x[dim:].reshape(dim, dim)

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        given = {"mean": state["mean"].clone(), "factor": state["factor"].clone()}
        state["mean"], state["factor"] = self.moved(state["params"], state["mean"], state["factor"])
        z = noise.normal(self.space.dim)
        return state["mean"] + torch.linalg.solve(state["factor"].T, z), given

    def gradient(self, state: State, samples: Sequence[State], advantages: Tensor) -> dict[str, Tensor]:
        params = {name: value.clone().requires_grad_() for name, value in state["params"].items()}
        with torch.enable_grad():
            total = torch.zeros((), dtype=torch.float64)
            for sample, weight in zip(samples, advantages, strict=True):
                mean, factor = self.moved(params, sample["given"]["mean"], sample["given"]["factor"])
                total = total + weight[0] * log_density(sample["u"], mean, factor)
            found = torch.autograd.grad(total, list(params.values()))
        return dict(zip(params, found, strict=True))

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        factor = state["factor"]
        covariance = torch.linalg.inv(factor @ factor.T)
        return state["mean"].clone(), covariance.diagonal().sqrt()
