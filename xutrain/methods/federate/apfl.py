"""APFL: every client mixes a model of its own with its local version of the global one, and may learn how much.

Deng et al., 2020 (arXiv 2003.13461). With u = a v + (1 - a) w, P local steps from w = x, both gradients on the same minibatch:

    w <- w - eta grad F(w);   v <- v - eta a grad F(u)
    once a round, where ``adaptive``:   a <- clip(a - mix_lr <grad F(u), v - w>, 0, 1)
    server:   x <- x + sum p_k (w_k - x)

w is averaged, v and a stay; v begins at the first received x. The inner product is that of the round's first step. Served: u.

Limits: x is FedAvg's for any a. Without ``adaptive``, a 0 is FedAvg, served after the client's own local steps; a 1 is local training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import FederatedMethod, Plan, Problem, Reply, Round, State, weighted_mean
from xutrain.methods.federate.local_steps import adam, memory_of
from xutrain.registry import Named, method


@method("federate", "apfl", paper="2003.13461", summary="a mixture of an own and the global model at every client")
class Apfl(FederatedMethod):
    personal = True
    adaptive = True
    without_buffers = True

    class Options(Named):
        name: Literal["apfl"] = "apfl"
        mix: float = Field(0.5, ge=0, le=1, description="Share a of the own model at the start.")
        adaptive: bool = Field(False, description="Learn a by gradient descent, once a round.")
        mix_lr: float = Field(0.1, ge=0, description="Learning rate of a.")

    options: Any

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        x, a = plan.tensors["model"], float(state.get("mix", self.options.mix))
        w, v = x.clone(), state.get("own", x).clone()
        memory_w, memory_v = memory_of(self.federation, state, "model"), memory_of(self.federation, state, "personal")
        slope = None
        for p in range(plan.steps):
            gradient = problem.gradient(w, p)
            mixed = problem.gradient(v * a + w * (1 - a), p)
            if slope is None:
                slope = float(torch.dot(mixed, v - w))
            w.add_(gradient if memory_w is None else adam(gradient, memory_w), alpha=-plan.lr)
            mixed = mixed * a
            v.add_(mixed if memory_v is None else adam(mixed, memory_v), alpha=-plan.lr)
        if self.options.adaptive and slope is not None:
            a = min(1.0, max(0.0, a - self.options.mix_lr * slope))
        state.update(own=v, local=w, mix=a)
        return Reply({"update": w - x}, measures={"mix": a})

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        server["model"].add_(weighted_mean(replies, "update")["update"])

    def served(self, server: State, state: State) -> Tensor:
        if "own" not in state:
            model: Tensor = server["model"]
            return model
        mixed: Tensor = state["own"] * state["mix"] + state["local"] * (1 - state["mix"])
        return mixed
