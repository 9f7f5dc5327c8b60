"""Controls of a search that never learn: the middle of every range, and a random search over whole trainings.

    fixed:    h = c in every round, c the middle of every range
    random:   h = c + s u,  u ~ U[-1/2, 1/2]^D,  s the width of every range; u drawn once for each training

``random`` spends one run's communication on ``trials`` trainings of equally many rounds (one more or less where they do not
divide), each from the initial model with its own h, drawn uniformly from the ranges; the training whose clients reported the
least validation loss in their last round is the one that is served. Its total traffic is that of one searched run. On a logarithmic
scale c and s are those of the logarithm.

Limits: ``fixed`` is the wrapped method with those values, bit for bit; trials 1 is one training with one drawn h.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import State
from xutrain.methods.federate.search.base import Agent, Noise
from xutrain.registry import Named, agent


@agent("fixed", summary="control: the middle of every range in every round", aliases=("centre", "center"))
class Fixed(Agent):
    """h = c."""

    learns: ClassVar[bool] = False
    resamples: ClassVar[bool] = False

    class Options(Named):
        name: Literal["fixed"] = "fixed"

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        return torch.zeros(self.space.dim, dtype=torch.float64), {}

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.space.dim, dtype=torch.float64), torch.zeros(self.space.dim, dtype=torch.float64)


@agent("random", summary="control: random search over whole trainings at equal total communication", aliases=("random_search",))
class RandomSearch(Agent):
    """u ~ U[-1/2, 1/2]^D, kept for a whole training."""

    learns: ClassVar[bool] = False

    class Options(Named):
        name: Literal["random"] = "random"
        trials: int = Field(4, ge=1, le=10**5, description="Trainings that share the run's rounds.")

    options: Any

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        return noise.uniform(self.space.dim) - 0.5, {}

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.space.dim, dtype=torch.float64), torch.full((self.space.dim,), 12**-0.5, dtype=torch.float64)
