"""Control variates for methods with local steps: clients walk along g_k(y) - c_k + c instead of g_k(y).

c_k (client) is the mean raw gradient along the client's last path, c (server) their p_k-weighted mean. At a common
fixed point all corrections cancel, so the limit is the minimiser of sum p_k F_k whatever the momenta are. Costs a second
vector each way. With plain SGD inside, the path mean equals SCAFFOLD's option II, c_k - c + (x - y_k)/(P eta).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, Round, State, Traffic, weighted_mean
from xutrain.methods.federate.double_momentum import DoubleMomentum


class Shifted:
    """A problem whose minibatch gradients get ``shift`` added; ``path`` sums the raw ones."""

    def __init__(self, problem: Problem, shift: Tensor) -> None:
        self.problem, self.shift = problem, shift
        self.path = torch.zeros_like(shift)

    def gradient(self, point: Tensor, step: int) -> Tensor:
        raw = self.problem.gradient(point, step)
        self.path.add_(raw)
        return raw.add_(self.shift)

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.problem.full_gradient(point)

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        return self.problem.evaluate(point, split)


class Controlled(DoubleMomentum):
    """A momentum method with control variates. ``refresh`` says where the new c_k comes from."""

    refresh: ClassVar[Literal["path", "full_gradient"]] = "path"

    def server_state(self, model: Tensor) -> State:
        return {**super().server_state(model), "control": torch.zeros_like(model)}

    def refresh_rule(self) -> str:
        """Where c_k comes from: "path" (option II) or "full_gradient" at the received model (option I)."""
        return self.refresh

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        plan.tensors["control"] = server["control"]
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        old, c = state.get("control"), plan.tensors["control"]
        shifted = Shifted(problem, c if old is None else c - old)
        reply = super().step(state, plan, shifted)
        if self.refresh_rule() == "full_gradient":
            fresh = problem.full_gradient(plan.tensors["model"]).clone()
        else:
            fresh = shifted.path / plan.steps
        reply.tensors["control"] = fresh.clone() if old is None else fresh - old
        state["control"] = fresh
        return reply

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        change = torch.zeros_like(server["control"])

        def counted() -> Iterator[Reply]:
            for reply in replies:  # c stays the sum over ALL clients of p_k c_k, whatever the weights of this round are
                change.add_(reply.tensors["control"], alpha=self.federation.weights[reply.client])
                yield reply

        mean = weighted_mean(counted(), "update")
        server["control"].add_(change)
        self.advance(server, round, mean)

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        traffic = super().traffic(numel, previous_lr)
        traffic.down["control"] = traffic.up["control"] = numel
        return traffic
