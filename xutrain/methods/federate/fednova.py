"""FedNova: averaging that does not favour clients with more local steps.

Wang et al., NeurIPS 2020. y_k is where client k's P_k steps from x end, rho the constant of its heavy ball:

    ||a_k||_1 = [P_k - rho (1 - rho^P_k)/(1 - rho)]/(1 - rho),  P_k for plain SGD;   d_k = (x - y_k)/(eta ||a_k||_1)
    x <- x - alpha eta tau_eff sum p_k d_k,   tau_eff = sum p_k ||a_k||_1

Limits: equal P_k is FedAvg (with the same local momentum, FedAvgLM-Z).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from xutrain.methods.federate.base import Plan, Problem, Reply, Round, State, weighted_mean
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


def gain(steps: int, rho: float) -> float:
    """||a||_1 of ``steps`` heavy-ball steps from a zero buffer; ``steps`` itself for rho 0."""
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


@method("federate", "fednova", paper="2007.07481", summary="averaging normalised by each client's own number of local steps")
class FedNova(DoubleMomentum):
    adaptive = True

    class Options(Named):
        name: Literal["fednova"] = "fednova"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        local_momentum: float = Field(0.0, ge=0, lt=1, description="Local momentum constant rho, buffer zeroed each round.")

    options: Any

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        reply = super().step(state, plan, problem)
        reply.tensors["update"].mul_(plan.steps / gain(plan.steps, self.value(plan, "local_momentum")))
        return reply

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        direction = weighted_mean(replies, "update")["update"]
        rho = self.value(round, "local_momentum")
        tau = sum(w * gain(p, rho) for w, p in zip(round.weights, round.steps, strict=True))
        server["model"].add_(direction, alpha=-self.value(round, "server_lr") * round.lr * tau)
