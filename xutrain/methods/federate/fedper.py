"""FedPer, FedRep and FedBN: some layers never leave their client, the others are averaged.

A client trains y = (received body, own head h_k) and sends the change of the body; only the averaged parameters are sent:

    all:      body <- body + sum p_k (body_k - body);   h_k stays
    FedPer:   P steps y <- y - eta g_k(y), body and head together
    FedRep:   head_epochs P steps of the head with the body frozen, then body_epochs P of the body with the head frozen
    FedBN:    as FedPer; h_k is the norm layers' parameters and statistics

FedPer (Arivazhagan et al., 2019), FedRep (Collins et al., ICML 2021), FedBN (Li et al., ICLR 2021). A net whose norm layers have
neither parameters nor statistics (instance norm without parameters) makes FedBN FedAvg, so it is refused.

Limits: all parameters averaged is FedAvg, none is local training (FedPer and FedRep refuse patterns that match no or
every parameter).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from xutrain.errors import Issue, RecipeError
from xutrain.methods.federate.base import FederatedMethod, Federation, Plan, Problem, Reply, Round, State, Traffic, weighted_mean
from xutrain.methods.federate.layers import NORMS, chosen, last_layer, mask
from xutrain.methods.federate.local_steps import descend, memory_of
from xutrain.registry import Named, method


class Partial(FederatedMethod):
    """Averages the parameters outside ``own`` (a mask), keeps those inside at the client."""

    personal = True
    adaptive = True
    plain = True
    options: Any

    def __init__(self, options: Any, federation: Federation) -> None:
        super().__init__(options, federation)
        self._own: Tensor | None = None
        self._first: Tensor | None = None  # the initial model, which every client draws for itself

    def patterns(self) -> tuple[str, ...]:
        """Names of what stays at the client."""
        return tuple(self.options.head) if self.options.head else last_layer(self.federation) if self.federation.names else ()

    def mask(self, like: Tensor) -> Tensor:
        """1 where a parameter is the client's own."""
        return mask(self.federation, self.patterns(), "method.head", like)

    def own(self, like: Tensor) -> Tensor:
        if self._own is None:
            self._own = self.mask(like)
        return self._own

    def server_state(self, model: Tensor) -> State:
        self.own(model)
        self._first = model.clone()
        return {"model": model.clone()}

    def shared(self, vector: Tensor) -> Tensor:
        """The averaged parameters alone, what is sent."""
        return vector[self.own(vector) == 0]

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        plan.tensors = {"model": self.shared(server["model"])}
        return plan

    def full(self, state: State, body: Tensor) -> Tensor:
        """The client's own parameters with the received others."""
        held = state.get("own", self._first)
        assert held is not None
        y: Tensor = held.clone()
        y[self.own(y) == 0] = body
        return y

    def received(self, state: State, plan: Plan) -> Tensor:
        return self.full(state, plan.tensors["model"])

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        body = plan.tensors["model"]
        y = self.train(state, plan, problem, self.received(state, plan))
        state["own"] = y
        return Reply({"model": self.shared(y) - body})

    def train(self, state: State, plan: Plan, problem: Problem, start: Tensor) -> Tensor:
        """Local steps from ``start``."""
        return descend(problem, start, plan, memory_of(self.federation, state, "model"))

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        model = server["model"]
        model[self.own(model) == 0] += weighted_mean(replies, "model")["model"]

    def served(self, server: State, state: State) -> Tensor:
        if "own" not in state:
            model: Tensor = server["model"]
            return model
        return self.full(state, self.shared(server["model"]))

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        assert self._own is not None
        sent = numel - int(self._own.sum())
        return Traffic(down={"model": sent}, up={"model": sent})


@method("federate", "fedper", paper="1912.00818", summary="the head stays with its client, the body is averaged; trained together")
class FedPer(Partial):
    class Options(Named):
        name: Literal["fedper"] = "fedper"
        head: list[str] = Field(default_factory=list, description="Patterns of the parameters that stay; empty: the last layer.")


@method(
    "federate",
    "fedrep",
    paper="2102.07078",
    summary="the head stays with its client and is trained first, then the body, which is averaged",
)
class FedRep(Partial):
    class Options(Named):
        name: Literal["fedrep"] = "fedrep"
        head: list[str] = Field(default_factory=list, description="Patterns of the parameters that stay; empty: the last layer.")
        head_epochs: int = Field(1, ge=1, description="Training of the head, in multiples of a round's local steps.")
        body_epochs: int = Field(1, ge=1, description="Training of the body, in multiples of a round's local steps.")

    def train(self, state: State, plan: Plan, problem: Problem, start: Tensor) -> Tensor:
        own, times = self.own(start), self.options
        head = memory_of(self.federation, state, "head")
        y = descend(problem, start, plan, head, steps=plan.steps * times.head_epochs, keep=own)
        body = memory_of(self.federation, state, "body")
        return descend(problem, y, plan, body, steps=plan.steps * times.body_epochs, keep=1 - own)


@method(
    "federate",
    "fedbn",
    paper="2102.07623",
    summary="norm layers stay with their client, the rest is averaged; refused where there is nothing to keep",
)
class FedBN(Partial):
    private_buffers = True

    class Options(Named):
        name: Literal["fedbn"] = "fedbn"
        layers: list[str] = Field(default_factory=lambda: list(NORMS), description="Patterns of the norm layers' parameters.")

    def mask(self, like: Tensor) -> Tensor:
        federation = self.federation
        if federation.names and not chosen(federation, self.options.layers):
            if not federation.buffers:
                hint = "take batch norm (unet: model.norm=batch), or method.name=fedavg"
                what = "the net has no norm layer with parameters or statistics, so FedBN is FedAvg"
                raise RecipeError(Issue("method.name", what, "fedbn", hint))
            return like * 0
        return mask(federation, self.options.layers, "method.layers", like)
