"""DS: discrete search, over the whole product grid or coordinate by coordinate.

Joint (the form of Mostafa, arXiv 1912.13075; the public programs name it and do not have it): grid points g_i in normalised
space, Lambda = I / init_std^2, mu learnt. Factorised (ours): an independent categorical law per coordinate, logits l learnt.

    joint:        P(i) proportional to exp(-1/2 (g_i - mu)' Lambda (g_i - mu));   grad_mu log P(i) = Lambda (g_i - E g)   (1)
    factorised:   p = softmax(l) in each coordinate;   grad_l log P = onehot - p                                         (2)

The joint law is exact up to 1e6 cells; a recipe with more is refused, as the grid of K = 8 aggregation weights with ten values
each has 1e8 cells by itself. The factorised one grows linearly and need not be bell-shaped.

Limits: lr 0 never learns; the factorised law starts uniform, the joint one as a bell around the middle of all ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.federate.base import State
from xutrain.methods.federate.search.base import Agent, Noise
from xutrain.methods.federate.search.gaussian import AdamOptions
from xutrain.methods.federate.search.space import AgentSpace
from xutrain.registry import agent


@agent("discrete", paper="2203.06338", summary="discrete search over the exact product grid (DS)", aliases=("ds",))
class Discrete(Agent):
    """The agent; state ``params``: mean (D,)."""

    class Options(AdamOptions):
        name: Literal["discrete"] = "discrete"
        init_std: float = Field(85**-0.25, gt=0, le=10, description="Lambda = I / init_std^2.")
        clamp: float | None = Field(0.5, gt=0, description="The mean stays in [-x, x]; null: anywhere.")

    options: Any

    def __init__(self, options: Any, space: AgentSpace, key: Key) -> None:
        super().__init__(options, space, key)
        axes = [torch.tensor(c.grid, dtype=torch.float64) for c in space.coordinates]
        self.grid = torch.cartesian_prod(*axes).reshape(-1, space.dim)

    def start(self) -> State:
        return {"params": {"mean": torch.zeros(self.space.dim, dtype=torch.float64)}, "adam": {}}

    def probabilities(self, mean: Tensor) -> Tensor:
        """P of every cell, shape (M,)."""
        return torch.softmax(-0.5 * (self.grid - mean).square().sum(1) / self.options.init_std**2, 0)

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        heights = self.probabilities(state["params"]["mean"]).cumsum(0)
        cell = int(torch.searchsorted(heights, noise.uniform(1) * heights[-1]))
        return self.grid[min(cell, len(self.grid) - 1)].clone(), {}

    def gradient(self, state: State, samples: Sequence[State], advantages: Tensor) -> dict[str, Tensor]:
        centre = self.probabilities(state["params"]["mean"]) @ self.grid
        total = sum(w * (s["u"] - centre) for s, w in zip(samples, advantages, strict=True))
        return {"mean": torch.as_tensor(total) / self.options.init_std**2}

    def project(self, state: State) -> None:
        if self.options.clamp is not None:
            state["params"]["mean"].clamp_(-self.options.clamp, self.options.clamp)

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        p = self.probabilities(state["params"]["mean"])
        centre = p @ self.grid
        return centre, (p @ (self.grid - centre).square()).sqrt()


@agent("discrete_factorised", summary="discrete search, an independent law per coordinate (ours)", aliases=("ds_factorised",))
class DiscreteFactorised(Agent):
    """The agent; state ``params``: logits (D, n), rows padded with -inf where a coordinate has fewer values."""

    class Options(AdamOptions):
        name: Literal["discrete_factorised"] = "discrete_factorised"
        lr: float = Field(0.1, ge=0, description="Learning rate of the logits' Adam.")

    options: Any

    def __init__(self, options: Any, space: AgentSpace, key: Key) -> None:
        super().__init__(options, space, key)
        most = max((len(c.grid) for c in space.coordinates), default=0)
        rows = [list(c.grid) + [0.0] * (most - len(c.grid)) for c in space.coordinates]
        self.grid = torch.tensor(rows, dtype=torch.float64).reshape(space.dim, most)
        self.real = torch.tensor([[i < len(c.grid) for i in range(most)] for c in space.coordinates]).reshape(space.dim, most)

    def start(self) -> State:
        return {"params": {"logits": torch.zeros_like(self.grid)}, "adam": {}}

    def probabilities(self, logits: Tensor) -> Tensor:
        """Every coordinate's law, shape (D, n)."""
        return torch.softmax(logits.masked_fill(~self.real, -torch.inf), 1)

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        heights = self.probabilities(state["params"]["logits"]).cumsum(1)
        chosen = torch.searchsorted(heights, noise.uniform(self.space.dim)[:, None] * heights[:, -1:])[:, 0]
        chosen = torch.minimum(chosen, self.real.sum(1) - 1)
        return self.grid.gather(1, chosen[:, None])[:, 0], {"cell": chosen}

    def gradient(self, state: State, samples: Sequence[State], advantages: Tensor) -> dict[str, Tensor]:
        p = self.probabilities(state["params"]["logits"])
        total = torch.zeros_like(p)
        for sample, weight in zip(samples, advantages, strict=True):
            total += weight[:, None] * (torch.nn.functional.one_hot(sample["given"]["cell"], p.shape[1]) - p)  # (2)
        return {"logits": total}

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        p = self.probabilities(state["params"]["logits"])
        centre = (p * self.grid).sum(1)
        return centre, (p * (self.grid - centre[:, None]).square()).sum(1).sqrt()
