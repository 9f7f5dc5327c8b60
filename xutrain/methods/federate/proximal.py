"""FedProx: local steps are pulled back to the received model.

Li et al., MLSys 2020. Local loss F_k(y) + (mu/2) ||y - x||^2; the server averages:

    P times from y_k = x:   y_k <- y_k - eta [g_k(y_k) + mu (y_k - x)]
    x <- x + alpha sum p_k (y_k - x)

With local momentum the bracket goes through a heavy ball, zeroed each round.

Limits: mu 0 is FedAvg; P = 1 is FedAvg for any mu.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, State
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


class Proximal:
    """A problem with (mu/2) ||y - centre||^2 added to its loss."""

    def __init__(self, problem: Problem, centre: Tensor, mu: float) -> None:
        self.problem, self.centre, self.mu = problem, centre, mu

    def gradient(self, point: Tensor, step: int) -> Tensor:
        return self.problem.gradient(point, step).add_(point - self.centre, alpha=self.mu)

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.problem.full_gradient(point).add_(point - self.centre, alpha=self.mu)

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        return self.problem.evaluate(point, split)


@method("federate", "fedprox", paper="1812.06127", summary="local loss with a proximal term towards the server model")
class FedProx(DoubleMomentum):
    normalised = False
    adaptive = True

    class Options(Named):
        name: Literal["fedprox"] = "fedprox"
        mu: float = Field(0.01, ge=0, description="Weight of the proximal term; 0 is FedAvg.")
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        local_momentum: float = Field(0.0, ge=0, lt=1, description="Local momentum constant, buffer zeroed each round.")

    options: Any

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        return super().step(state, plan, Proximal(problem, plan.tensors["model"], self.value(plan, "mu")))
