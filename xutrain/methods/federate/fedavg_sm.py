"""FedAvgSM: FedAvg with momentum on the server (also known as FedAvgM, and as SlowMo with SGD inside).

Baseline of arXiv 2102.03970. m <- mu_s m + sum p_k d_k; x <- x - alpha eta P m. server_momentum 0 is FedAvg.
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
