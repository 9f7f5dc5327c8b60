"""Mime and MimeLite with momentum: local steps use a server statistic that is frozen during the round.

Karimireddy et al., 2020 (arXiv 2008.03606). s is the server momentum (an average, not heavy ball), z a minibatch:

    Mime:       y <- y - eta [(1 - b)(g_k(y; z) - g_k(x; z) + c) + b s], the same minibatch z in both
    MimeLite:   y <- y - eta [(1 - b) g_k(y; z) + b s]
    server:     c = sum p_k g_k(x);   s <- (1 - b) c + b s;   x <- sum p_k y_k

g_k(x) is the full gradient. Mime's clients send it first and receive c; with MimeLite it travels with the model.

Limits: momentum 0 makes MimeLite FedAvg; P = 1 makes Mime x <- x - eta s with the new s. Mime ends at argmin of sum p_k F_k.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import FederatedMethod, Plan, Problem, Reply, Round, State, Traffic, weighted_mean
from xutrain.registry import Named, method


class MimeOptions(Named):
    """Options of both."""

    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum constant b of the server statistic.")


@method("federate", "mime_lite", paper="2008.03606", summary="frozen server momentum in the local steps (double traffic)")
class MimeLite(FederatedMethod):
    class Options(MimeOptions):
        name: Literal["mime_lite"] = "mime_lite"

    options: Any

    def server_state(self, model: Tensor) -> State:
        return {"model": model.clone(), "momentum": torch.zeros_like(model)}

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        plan.tensors["momentum"] = server["momentum"]
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        x = plan.tensors["model"]
        update = self.walk(plan, problem, x, None)
        return Reply({"update": update, "gradient": problem.full_gradient(x).clone()})

    def walk(self, plan: Plan, problem: Problem, x: Tensor, c: Tensor | None) -> Tensor:
        """y_k - x after the local steps; with ``c`` the gradients are corrected as Mime does."""
        b, s, y = self.value(plan, "momentum"), plan.tensors["momentum"], x.clone()
        for p in range(plan.steps):
            direction = problem.gradient(y, p)
            if c is not None:
                direction = direction.clone()
                direction.sub_(problem.gradient(x, p)).add_(c)
            y.add_(direction.mul_(1 - b).add_(s, alpha=b), alpha=-plan.lr)
        return y.sub_(x)

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        mean = weighted_mean(replies, "update", "gradient")
        self.finish(server, round, mean["update"], mean["gradient"])

    def finish(self, server: State, round: Round, update: Tensor, gradient: Tensor) -> None:
        """Server step of both methods."""
        b = self.value(round, "momentum")
        server["momentum"].mul_(b).add_(gradient, alpha=1 - b)
        server["model"].add_(update)

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        return Traffic(down={"model": numel, "momentum": numel}, up={"update": numel, "gradient": numel})


@method("federate", "mime", paper="2008.03606", summary="MimeLite with corrected gradients; two exchanges a round (triple down, double up)")
class Mime(MimeLite):
    exchanges = 2

    class Options(MimeOptions):
        name: Literal["mime"] = "mime"

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        if exchange == 0:
            return FederatedMethod.plan(self, server, round, client, exchange)
        plan = super().plan(server, round, client, exchange)
        plan.tensors["gradient"] = server["gradient"]
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        if plan.exchange == 0:
            state["model"] = plan.tensors["model"]
            return Reply({"gradient": problem.full_gradient(state["model"]).clone()})
        return Reply({"update": self.walk(plan, problem, state.pop("model"), plan.tensors["gradient"])})

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        if exchange == 0:
            server["gradient"] = weighted_mean(replies, "gradient")["gradient"]
        else:
            self.finish(server, round, weighted_mean(replies, "update")["update"], server.pop("gradient"))

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        return Traffic(down={"model": numel, "momentum": numel, "gradient": numel}, up={"update": numel, "gradient": numel})
