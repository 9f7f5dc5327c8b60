"""FedAvg: average of the models after local SGD.

McMahan et al., AISTATS 2017. d_k is the mean gradient along client k's path (with local momentum, the mean of its buffer b):

    P times from y_k = x_r:   b <- mu_l b + g_k(y_k);   y_k <- y_k - eta b
    x_{r+1} = x_r + alpha sum p_k (y_k - x_r) = x_r - alpha eta P sum p_k d_k

With ``nesterov`` the step is along g + mu_l b. b starts from zero, or from the client's own last one (``momentum_buffer: keep``).

Limits: alpha = 1 is the average of the clients' models; one local step of everybody, without momentum, is SGD on the mean gradient;
one client with alpha = 1 is SGD.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from xutrain.methods.federate.base import Federation
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


@method("federate", "fedavg", paper="1602.05629", summary="average of the clients' models after local SGD")
class FedAvg(DoubleMomentum):
    normalised = False
    adaptive = True

    class Options(Named):
        name: Literal["fedavg"] = "fedavg"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha; 1 takes the average as it is.")
        local_momentum: float = Field(0.0, ge=0, lt=1, description="Momentum constant of the clients' SGD.")
        nesterov: bool = Field(False, description="That momentum looks ahead.")
        momentum_buffer: Literal["reset", "keep"] = Field(
            "reset", description="Clients start each round with an empty buffer, or with their own last one."
        )

    def __init__(self, options: Any, federation: Federation) -> None:
        super().__init__(options, federation)
        self.local_buffer = "carry" if options.momentum_buffer == "keep" else "zero"
        self.nesterov = options.nesterov
