"""SoftPull: every client's model stays its own and is pulled a little towards the others'. The mathematics, and the method alone.

Paper: arXiv 2203.10144 (FedSM). With K models, all at once, and W their stack:

    w_k <- lambda w_k + (1 - lambda)/(K - 1) sum over j != k of w_j                                                  (1)
    W <- M W,   M = rho I + (1 - rho) J/K,   rho = (K lambda - 1)/(K - 1), which is the same                         (2)
    fixed point of training and pull on quadratics: w_k = mean(b) + s (b_k - mean(b)),   s = rho (1 - G)/(1 - rho G)   (3)

M is symmetric and doubly stochastic: the mean of the models never changes, every deviation from it is multiplied by rho.
(3) is for F_k = a/2 (w - b_k)^2 with P steps eta a round, G = (1 - eta a)^P: the minimiser of
sum F_k + (c/2) sum (w_k - mean)^2 with c = a (1 - rho)/(rho (1 - G)). No data-size weights.

The method: each round every client trains its own model and sends it; the server pulls. Nothing but models crosses.

Limits: lambda 1 is local training, 1/K is full averaging, below 1/K overshoots (rho < 0). K = 1: identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Committee, FederatedMethod, Plan, Problem, Reply, Round, State, Traffic
from xutrain.methods.federate.local_steps import descend, memory_of
from xutrain.registry import Named, method


def rho(clients: int, lam: float) -> float:
    """What a deviation from the mean is multiplied by, (2); 1 for a single client."""
    return 1.0 if clients == 1 else (clients * lam - 1) / (clients - 1)


def softpull(models: Sequence[Tensor], lam: float, weights: Sequence[float] | None = None) -> list[Tensor]:
    """New models by (1). ``weights`` (ours) weigh the others by size: w_k <- lambda w_k + (1 - lambda) their weighted mean."""
    if len(models) == 1:
        return [models[0].clone()]
    if weights is None:
        # rho w_k + (1 - rho) mean, which is (1) with one sum for all clients
        factor = rho(len(models), lam)
        if factor == 1.0:
            return [model.clone() for model in models]
        total = torch.zeros_like(models[0])
        for model in models:
            total.add_(model)
        mean = total.div_(len(models))
        return [mean.clone() if factor == 0.0 else (model - mean).mul_(factor).add_(mean) for model in models]
    pulled = []
    for k, own in enumerate(models):
        others = [(w, m) for j, (w, m) in enumerate(zip(weights, models, strict=True)) if j != k]
        share = sum(w for w, _ in others)
        new = own * lam
        for w, m in others:
            new.add_(m, alpha=(1 - lam) * w / share)
        pulled.append(new)
    return pulled


def shrinkage(clients: int, lam: float, curvature: float, lr: float, steps: int) -> float:
    """s of (3): 0 is FedAvg's common model, 1 local training."""
    factor, kept = rho(clients, lam), (1 - lr * curvature) ** steps
    return factor * (1 - kept) / (1 - factor * kept)


class PullOptions(Named):
    """Options of the pull."""

    lam: float = Field(0.7, ge=0, le=1, description="lambda, the weight of the own model: 1/K is full averaging, 1 local training.")
    softpull_weights: Literal["equal", "size"] = Field("equal", description="size: the others weigh by their samples (ours).")


class Pulling(FederatedMethod):
    """The part that SoftPull alone and FedSM share: one model per client at the server, pulled in every round."""

    adaptive = True
    plain = True
    without_buffers = True
    options: Any

    def pull(self, server: State, round: Round) -> None:
        """(1) on all models that the server holds."""
        weights = self.federation.weights if self.options.softpull_weights == "size" else None
        server["personal"] = softpull(server["personal"], self.value(round, "lam"), weights)

    def notes(self) -> list[str]:
        k, chosen = self.federation.clients, self.options.lam
        if k > 1 and chosen < 1 / k - 1e-3:
            return [f"lambda {chosen:g} is below 1/K = {1 / k:.3g}: SoftPull overshoots, deviations are multiplied by {rho(k, chosen):.3g}"]
        return []


@method(
    "federate",
    "softpull",
    paper="2203.10144",
    summary="a model per client, pulled towards the others each round (FedSM without its selector)",
)
class SoftPull(Pulling):
    personal = True

    class Options(PullOptions):
        name: Literal["softpull"] = "softpull"

    def server_state(self, model: Tensor) -> State:
        return {"model": model.clone(), "personal": [model.clone() for _ in range(self.federation.clients)]}

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        plan.tensors = {"personal": server["personal"][client]}
        return plan

    def received(self, state: State, plan: Plan) -> Tensor:
        return plan.tensors["personal"]

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        return Reply({"personal": descend(problem, plan.tensors["personal"], plan, memory_of(self.federation, state, "personal"))})

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        for client, model in [(r.client, r.tensors["personal"]) for r in replies]:
            server["personal"][client] = model
        self.pull(server, round)
        server["model"] = torch.stack(server["personal"]).mean(dim=0)  # for whoever is no client

    def committee(self, server: State) -> Committee:
        return Committee(server["model"], tuple(server["personal"]), "own")

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        return Traffic(down={"personal": numel}, up={"personal": numel})
