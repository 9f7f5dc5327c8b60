"""Ditto: FedAvg, and beside it a personal model per client that is held near the global one and never sent.

Li et al., ICML 2021. v_k minimises F_k(v) + (strength/2) ||v - x_r||^2 with x_r the model received in this round:

    v_k <- v_k - eta [g_k(v_k) + strength (v_k - x_r)]        personal_epochs P times a round
    x_{r+1} = x_r + sum p_k (y_k - x_r)                       y_k after P local steps from x_r, as FedAvg

v_k starts from the first received model and goes on from its own last state. A large strength keeps v_k at x_r (plain gradient
descent needs lr * strength < 2).

Limits: strength 0 is local training; the global model is FedAvg's for any strength.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, State
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.methods.federate.local_steps import descend, memory_of
from xutrain.methods.federate.proximal import Proximal
from xutrain.registry import Named, method


@method("federate", "ditto", paper="2012.04221", summary="FedAvg, and a personal model per client held near the global one")
class Ditto(DoubleMomentum):
    normalised = False
    personal = True
    adaptive = True
    without_buffers = True

    class Options(Named):
        name: Literal["ditto"] = "ditto"
        strength: float = Field(1.0, ge=0, description="Weight of the proximal term (lambda of the paper); 0 is local training.")
        personal_epochs: int = Field(1, ge=1, description="Training of the personal model, in multiples of a round's local steps.")

    options: Any

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        received = plan.tensors["model"]
        reply = super().step(state, plan, problem)
        near = Proximal(problem, received, self.value(plan, "strength"))
        memory = memory_of(self.federation, state, "personal")
        start = state.get("own", received)
        state["own"] = descend(near, start, plan, memory, steps=plan.steps * self.options.personal_epochs)
        return reply

    def served(self, server: State, state: State) -> Tensor:
        own: Tensor = state["own"] if "own" in state else server["model"]
        return own
