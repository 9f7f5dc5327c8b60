"""FedAvgSLM and FedAvgSLM-Z: momentum on the server and inside the clients, without fusion.

Baselines of arXiv 2102.03970. d_k is the mean of the local buffer b over the steps of a round, which start from y = x:

    P times: b <- mu_l b + g_k(y),  y <- y - eta b;      m <- mu_s m + sum p_k d_k,  x <- x - alpha eta P m
    SLM:     b starts from sum p_k b_k, the buffers at the end of the round before
    SLM-Z:   b starts from 0

SLM averages the local buffers (double traffic), SLM-Z sets them to zero each round.

Limits: both momenta 0 is FedAvg (equal P_k); local_momentum 0 is FedAvgSM; DOMO with beta 0 is FedAvgSLM-Z.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


@method(
    "federate",
    "fedavg_slm",
    paper="2102.03970",
    summary="server and local momentum, buffer averaged (double traffic)",
    aliases=("fedavgslm",),
)
class FedAvgSLM(DoubleMomentum):
    local_buffer = "average"

    class Options(Named):
        name: Literal["fedavg_slm"] = "fedavg_slm"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        server_momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum constant mu_s.")
        local_momentum: float = Field(0.9, ge=0, lt=1, description="Local momentum constant mu_l.")


@method("federate", "fedavg_slm_z", paper="2102.03970", summary="server and local momentum, buffer set to zero", aliases=("fedavgslm_z",))
class FedAvgSLMZ(DoubleMomentum):
    class Options(Named):
        name: Literal["fedavg_slm_z"] = "fedavg_slm_z"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        server_momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum constant mu_s.")
        local_momentum: float = Field(0.9, ge=0, lt=1, description="Local momentum constant mu_l.")
