"""Server momentum, local momentum and momentum fusion: one algorithm, of which eight methods are settings.

Paper: arXiv 2102.03970 (DOMO). Symbols, with the names used here:
  x_r  ``model``            server model                m_r  ``momentum``  server momentum buffer, in gradient units
  eta  ``lr``               local learning rate         P    ``steps``     local steps of a round
  alpha ``server_lr``       mu_s ``server_momentum``    mu_l ``local_momentum``    beta ``beta``

Client (per round), from x_r:
  m_r   = 0 in round 0, else (x_{r-1} - x_r) / (alpha eta_{r-1} P), inferred: never sent when all clients take part   (1)
  start = x_r - eta beta P m_r  when fusion is "pre", else x_r                                                       (2)
  b     = 0 ("zero"), the averaged buffer ("average") or the client's own last one ("carry")                         (3)
  P times: b <- mu_l b + g(y);  y <- y - eta b  [- eta beta m_r when fusion is "intra"]                               (4)
  d_k   = mean of b over the steps; the fusion move is no part of it                                                  (5)
Server:
  m_{r+1} = mu_s m_r + sum p_k d_k;   x_{r+1} = x_r - alpha eta P m_{r+1}                                             (6)

Limits: mu_s = mu_l = beta = 0 and alpha = 1 is FedAvg; beta = 0 is FedAvgSLM-Z; P = 1 with beta = 0 is heavy-ball SGD;
P = 1 with beta = alpha mu_s, alpha = 1 is Nesterov's method. Clients with different P_k: d_k uses the client's own P_k
and the server steps with sum p_k P_k (ours; the paper has equal shards); methods without server momentum instead average
the models, as published (``normalised`` False).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from xutrain.methods.federate.base import FederatedMethod, Plan, Problem, Reply, Round, State, Traffic, weighted_mean
from xutrain.methods.federate.local_steps import Directed, memory_of

TINY = 1e-30  # below it, lr times momentum is no float32 number any more


class DoubleMomentum(FederatedMethod):
    """Equations (1) to (6). Subclasses choose the class attributes and declare the options they let a recipe set."""

    local_buffer: Literal["zero", "average", "carry"] = "zero"
    fusion: ClassVar[Literal["none", "pre", "intra"]] = "none"
    #: With unequal P_k every client weighs p_k; else the models are averaged, which weighs by p_k P_k (plain FedAvg).
    normalised: ClassVar[bool] = True
    #: The local momentum looks ahead, as torch.optim.SGD(nesterov=True).
    nesterov: bool = False
    #: Clients use the server's momentum: they infer it from two models in a row, or are sent it.
    follows: ClassVar[bool] = False

    def server_state(self, model: Tensor) -> State:
        state = {"model": model.clone(), "momentum": torch.zeros_like(model)}
        if self.local_buffer == "average":
            state["buffer"] = torch.zeros_like(model)
        return state

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        if self.local_buffer == "average":
            plan.tensors["buffer"] = server["buffer"]
        if self._sends_momentum(server.get("lr")):
            plan.tensors["momentum"] = server["momentum"]
        return plan

    def _sends_momentum(self, previous_lr: float | None) -> bool:
        """A client that may have missed a model, or that would divide by an lr of (nearly) 0, cannot infer m_r."""
        return self.follows and (self.federation.partial or (previous_lr is not None and previous_lr < TINY))

    def server_direction(self, state: State, plan: Plan) -> Tensor | None:
        """m_r as the client knows it, equation (1); None in round 0."""
        if "momentum" in plan.tensors:
            return plan.tensors["momentum"]
        if "model" not in state:
            return None
        previous: Tensor = state["model"]
        return (previous - plan.tensors["model"]) / state["scale"]

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        x, lr, steps = plan.tensors["model"], plan.lr, plan.steps
        mu = self.value(plan, "local_momentum")
        memory = memory_of(self.federation, state, "model") if self.adaptive else None
        if memory is not None:  # local Adam: g below is its direction
            problem = Directed(problem, memory)
        direction = self.server_direction(state, plan) if self.fusion != "none" else None
        y = x.clone()
        shift = 0.0
        if direction is not None:
            shift = -lr * self.beta(plan)
            if self.fusion == "pre":
                y.add_(direction, alpha=shift * plan.mean_steps)  # (2)
        buffer = self._start_buffer(state, plan)
        total = torch.zeros_like(x)
        for p in range(steps):  # (4)
            gradient = problem.gradient(y, p)
            if mu:
                buffer = buffer.mul_(mu).add_(gradient) if buffer is not None else gradient.clone()
                gradient = gradient.add(buffer, alpha=mu) if self.nesterov else buffer
            y.add_(gradient, alpha=-lr)
            total.add_(gradient)
            if direction is not None and self.fusion == "intra":
                y.add_(direction, alpha=shift)
        if lr != plan.common_lr and not self.normalised:
            total.mul_(lr / plan.common_lr)  # the server multiplies by the round's lr: the models are averaged all the same
        reply = Reply({"update": total.div_(steps if self.normalised else plan.mean_steps)})  # (5)
        if self.local_buffer == "average":
            reply.tensors["buffer"] = buffer if buffer is not None else torch.zeros_like(x)
        elif self.local_buffer == "carry" and buffer is not None:
            state["buffer"] = buffer
        if self.follows and not self.federation.partial:
            state["model"] = x.clone()
            state["scale"] = self.value(plan, "server_lr", 1.0) * plan.common_lr * plan.mean_steps
        return reply

    def beta(self, plan: Plan) -> float:
        """Fusion constant of this round."""
        return self.value(plan, "beta")

    def _start_buffer(self, state: State, plan: Plan) -> Tensor | None:
        if self.local_buffer == "average":
            return plan.tensors["buffer"].clone()
        held: Tensor | None = state.get("buffer") if self.local_buffer == "carry" else None
        return held.clone() if held is not None else None

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        names = ("update", "buffer") if self.local_buffer == "average" else ("update",)
        self.advance(server, round, weighted_mean(replies, *names))

    def advance(self, server: State, round: Round, mean: dict[str, Tensor]) -> None:
        """Equation (6) with the merged directions."""
        momentum = server["momentum"].mul_(self.value(round, "server_momentum")).add_(mean["update"])
        server["model"].add_(momentum, alpha=-self.value(round, "server_lr", 1.0) * round.lr * round.mean_steps)
        if "buffer" in mean:
            server["buffer"] = mean["buffer"]
        server["lr"] = round.lr

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        traffic = Traffic(down={"model": numel}, up={"update": numel})
        if self.local_buffer == "average":
            traffic.down["buffer"] = traffic.up["buffer"] = numel
        if self._sends_momentum(previous_lr):
            traffic.down["momentum"] = numel
        return traffic
