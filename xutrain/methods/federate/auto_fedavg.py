"""Auto-FedAvg: aggregation weights learnt by gradient on the clients' validation loss.

Xia et al., arXiv 2104.10195, from memory of the published rule: a = softmax(beta),
beta <- beta - eta grad_beta sum_k v_k L_k^val(sum_j a_j w^j), with v_k the client's share of the validation samples (here: p_k). The
gradient needs no further round: the model that a client receives is sum_j a_j w^j, so its answer carries the gradient of its
validation loss there, one vector more, and the server, which kept the updates Delta_j = alpha (w^j - w) of the round before, takes

    g_j = <sum_k p_k grad L_k^val(w), Delta_j>,    grad_beta = a * (g - <a, g>)                                    (1)
    beta <- beta - eta grad_beta;   a = softmax(beta);   w <- w + sum_j a_j Delta_j, with the new Delta_j

alpha is ``server_lr`` and eta ``weight_lr``. beta starts at ln p_k. The weights of round q learn in round q + 1.

Limits: the first round is FedAvg; weight_lr 0 is FedAvg for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, Round, State, Traffic, Validated
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


@method(
    "federate",
    "auto_fedavg",
    paper="2104.10195",
    summary="aggregation weights learnt by gradient on validation loss",
    aliases=("autofedavg",),
)
class AutoFedAvg(DoubleMomentum):
    normalised = False
    validates = True

    class Options(Named):
        name: Literal["auto_fedavg"] = "auto_fedavg"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        local_momentum: float = Field(0.0, ge=0, lt=1, description="Local momentum constant, buffer zeroed each round.")
        weight_lr: float = Field(1.0, ge=0, description="Learning rate eta of beta; 0 is FedAvg.")

    options: Any

    def server_state(self, model: Tensor) -> State:
        logits = torch.tensor([math.log(w) for w in self.federation.weights], dtype=torch.float64)
        return {"model": model.clone(), "logits": logits, "deltas": {}}

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        assert isinstance(problem, Validated)
        slope = problem.validation_gradient(plan.tensors["model"])
        reply = super().step(state, plan, problem)
        reply.tensors["update"].mul_(-plan.common_lr * plan.mean_steps)  # w^j - w, whatever P_k is
        reply.tensors["slope"] = slope
        return reply

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        slope = torch.zeros_like(server["model"])
        deltas: dict[str, Tensor] = {}
        for reply in replies:
            slope.add_(reply.tensors["slope"], alpha=reply.weight)
            deltas[str(reply.client)] = reply.tensors["update"]
        if server["deltas"]:
            self.learn(server, slope, self.value(round, "weight_lr"))
        a = self.shares(server, [int(k) for k in deltas])
        for share, delta in zip(a.tolist(), deltas.values(), strict=True):
            server["model"].add_(delta.mul_(self.value(round, "server_lr")), alpha=share)
        server["deltas"] = deltas

    def shares(self, server: State, clients: list[int]) -> Tensor:
        """a of those clients, summing to 1."""
        return torch.softmax(server["logits"][clients], 0)

    def learn(self, server: State, slope: Tensor, lr: float) -> None:
        """(1) with the updates of the round before."""
        clients = [int(k) for k in server["deltas"]]
        a = self.shares(server, clients)
        g = torch.stack([torch.dot(slope, delta).double().cpu() for delta in server["deltas"].values()])
        server["logits"][clients] -= lr * a * (g - a @ g)

    def report(self, server: State) -> dict[str, float]:
        a = torch.softmax(server["logits"], 0).tolist()
        return {f"weight_{k}": w for k, w in enumerate(a)} if len(a) <= 32 else {}

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        return Traffic(down={"model": numel}, up={"update": numel, "slope": numel})
