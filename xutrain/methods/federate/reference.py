"""The two ends between which every federated method lies: all data in one place, and nobody talks.

    central:   b <- mu_l b + g(y);   y <- y - eta b      g the gradient on the union of the clients' samples, batch K times the client's
    local:     b_k <- mu_l b_k + g_k(y_k);   y_k <- y_k - eta b_k      a model of its own at every client

``central`` makes the same number of passes. Of ``local`` the mean over the clients' models is reported.
Both keep their momentum buffer from round to round, and neither sends a bit.

Limits: local_momentum 0 is plain SGD; with one client the two are the same training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, Round, State
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


@method("federate", "central", summary="reference: SGD on the union of all clients' data", aliases=("centralised", "centralized"))
class Central(DoubleMomentum):
    pooled = True
    silent = True
    adaptive = True
    local_buffer = "carry"

    class Options(Named):
        name: Literal["central"] = "central"
        local_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum constant.")

    options: Any


@method("federate", "local", summary="reference: every client alone with its own data", aliases=("local_only",))
class Local(DoubleMomentum):
    personal = True
    silent = True
    adaptive = True
    local_buffer = "carry"

    class Options(Named):
        name: Literal["local"] = "local"
        local_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum constant.")

    options: Any

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        own = state.get("own")
        plan.tensors["model"] = plan.tensors["model"] if own is None else own
        reply = super().step(state, plan, problem)
        state["own"] = plan.tensors["model"].add(reply.tensors.pop("update"), alpha=-plan.lr * plan.steps)
        return reply

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        for _ in replies:
            pass  # using up the stream is what makes the clients work

    def served(self, server: State, state: State) -> Tensor:
        own: Tensor = state["own"] if "own" in state else server["model"]
        return own
