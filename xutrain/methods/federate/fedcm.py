"""FedCM: every local step is blended with the last server direction.

Xu et al., 2021 (arXiv 2106.10874). D is the last server direction without accumulation, 0 in the first round:

    P times from y = x_r:   y <- y - eta [a g_k(y) + (1 - a) D],   D = (x_{r-1} - x_r) / (alpha eta P)
    x_{r+1} = x_r - alpha eta P sum p_k d_k,   d_k the mean of the bracket over the steps

Clients infer D as DOMO's clients infer m_r. DOMO-S instead adds beta m_r, and keeps it out of what is sent.

Limits: a = 1 is FedAvg (equal P_k); the first round is FedAvg with a eta in the place of the local lr.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, State
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


class Blended:
    """A problem whose minibatch gradients become a g + (1 - a) direction."""

    def __init__(self, problem: Problem, direction: Tensor | None, a: float) -> None:
        self.problem, self.direction, self.a = problem, direction, a

    def gradient(self, point: Tensor, step: int) -> Tensor:
        gradient = self.problem.gradient(point, step).mul_(self.a)
        return gradient if self.direction is None else gradient.add_(self.direction, alpha=1 - self.a)

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.problem.full_gradient(point)

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        return self.problem.evaluate(point, split)


@method("federate", "fedcm", paper="2106.10874", summary="local gradients blended with the last server direction")
class FedCM(DoubleMomentum):
    follows = True

    class Options(Named):
        name: Literal["fedcm"] = "fedcm"
        a: float = Field(0.1, gt=0, le=1, description="Share of the client's own gradient in a local step; 1 is FedAvg.")
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")

    options: Any

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        return super().step(state, plan, Blended(problem, self.server_direction(state, plan), self.value(plan, "a")))
