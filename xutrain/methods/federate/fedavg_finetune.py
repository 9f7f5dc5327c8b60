"""FedAvg, and in the last round every client fine-tunes the global model for itself.

All rounds but the last are FedAvg's; in the last one a client receives x, takes ``finetune_epochs`` times its local steps, keeps the
result and sends nothing:

    rounds before the last:   x <- x + sum p_k (y_k - x),   y_k after P steps y <- y - eta g_k(y) from x
    last round:               w_k <- w_k - eta g_k(w_k),   finetune_epochs P times from w_k = x

Served: w_k. The least that a personalised method must beat.

Limits: one round is local training of the initial model; a client that misses the last round is served FedAvg's model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, Round, State, Traffic
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.methods.federate.local_steps import descend
from xutrain.registry import Named, method


@method("federate", "fedavg_finetune", paper="1602.05629", summary="FedAvg, then local fine-tuning in the last round")
class FedAvgFinetune(DoubleMomentum):
    normalised = False
    personal = True
    adaptive = True

    class Options(Named):
        name: Literal["fedavg_finetune"] = "fedavg_finetune"
        finetune_epochs: int = Field(5, ge=1, description="Fine-tuning, in multiples of a round's local steps.")

    options: Any

    def last(self, index: int) -> bool:
        """Whether round ``index`` is the one of the fine-tuning."""
        return index == self.federation.rounds - 1

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        if not self.last(plan.round):
            return super().step(state, plan, problem)
        memory: State | None = {} if self.federation.optimizer == "adam" else None  # a new task, a new optimizer
        steps = plan.steps * int(self.value(plan, "finetune_epochs"))
        state["own"] = descend(problem, plan.tensors["model"], plan, memory, steps=steps)
        return Reply()

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        if not self.last(round.index):
            super().merge(server, round, replies, exchange)
            return
        for _ in replies:
            pass  # using up the stream is what makes the clients work

    def served(self, server: State, state: State) -> Tensor:
        own: Tensor = state["own"] if "own" in state else server["model"]
        return own

    def traffic_in(self, round: Round, numel: int, previous_lr: float | None = None) -> Traffic:
        traffic = self.traffic(numel, previous_lr)
        return Traffic(traffic.down, {}) if self.last(round.index) else traffic
