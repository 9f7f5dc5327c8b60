"""FedAdam, FedYogi and FedAdagrad: an adaptive optimizer on the server.

Reddi et al., ICLR 2021. The pseudo-gradient is Delta = sum p_k (y_k - x), y_k the end of client k's local steps:

    u <- b1 u + (1 - b1) Delta;   x <- x + server_lr u / (sqrt(v) + tau)
    FedAdam:      v <- b2 v + (1 - b2) Delta^2
    FedYogi:      v <- v - (1 - b2) Delta^2 sign(v - Delta^2)
    FedAdagrad:   v <- v + Delta^2

v is renewed before it is used; u_0 = 0, v_0 = tau^2, without bias correction. b1 and b2 are ``beta1`` and ``beta2``.

Limits: FedAdam with beta1 0, beta2 0 and a tau far above |Delta| approaches FedAvg with server learning rate
server_lr / tau.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Problem, Reply, Round, State, weighted_mean
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


class FedOptOptions(Named):
    """Options of the three methods."""

    server_lr: float = Field(0.1, gt=0, description="Server learning rate eta_g.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    tau: float = Field(1e-3, gt=0, description="Degree of adaptivity, added to the root of the second moment.")
    local_momentum: float = Field(0.0, ge=0, lt=1, description="Local momentum constant, buffer zeroed each round.")


class DecayOptions(FedOptOptions):
    """Options of the two whose second moment decays."""

    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")


class FedOpt(DoubleMomentum):
    """The part that the three share."""

    rule: ClassVar[Literal["adam", "yogi", "adagrad"]]
    adaptive = True
    options: Any

    def server_state(self, model: Tensor) -> State:
        return {"model": model.clone(), "first": torch.zeros_like(model), "second": torch.full_like(model, self.options.tau**2)}

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        reply = super().step(state, plan, problem)
        reply.tensors["update"].mul_(-plan.lr * plan.steps)  # y_k - x
        return reply

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        delta = weighted_mean(replies, "update")["update"]
        first, second = server["first"], server["second"]
        beta1, square = self.value(round, "beta1"), delta * delta
        first.mul_(beta1).add_(delta, alpha=1 - beta1)
        beta2 = self.value(round, "beta2")
        if self.rule == "adam":
            second.mul_(beta2).add_(square, alpha=1 - beta2)
        elif self.rule == "yogi":
            second.sub_(square * torch.sign(second - square), alpha=1 - beta2)
        else:
            second.add_(square)
        server["model"].addcdiv_(first, second.sqrt().add_(self.value(round, "tau")), value=self.value(round, "server_lr"))


@method("federate", "fedadam", paper="2003.00295", summary="Adam on the server")
class FedAdam(FedOpt):
    rule = "adam"

    class Options(DecayOptions):
        name: Literal["fedadam"] = "fedadam"


@method("federate", "fedyogi", paper="2003.00295", summary="Yogi on the server")
class FedYogi(FedOpt):
    rule = "yogi"

    class Options(DecayOptions):
        name: Literal["fedyogi"] = "fedyogi"


@method("federate", "fedadagrad", paper="2003.00295", summary="Adagrad on the server")
class FedAdagrad(FedOpt):
    rule = "adagrad"

    class Options(FedOptOptions):
        name: Literal["fedadagrad"] = "fedadagrad"
