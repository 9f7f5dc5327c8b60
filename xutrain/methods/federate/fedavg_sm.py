"""FedAvgSM: FedAvg with momentum on the server (also known as FedAvgM, and as SlowMo with SGD inside).

Baseline of arXiv 2102.03970. d_k is the mean gradient along client k's P steps y <- y - eta g_k(y) from x:

    m <- mu_s m + sum p_k d_k;   x <- x - alpha eta P m

Limits: server_momentum 0 is FedAvg (equal P_k); P = 1 with alpha = 1 is heavy-ball SGD on the mean gradient.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


@method(
    "federate", "fedavg_sm", paper="2102.03970", summary="FedAvg with server momentum (FedAvgM, SlowMo)", aliases=("fedavgsm", "fedavgm")
)
class FedAvgSM(DoubleMomentum):
    class Options(Named):
        name: Literal["fedavg_sm"] = "fedavg_sm"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        server_momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum constant mu_s (heavy ball).")
