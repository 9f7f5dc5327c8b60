"""FedAvgLM and FedAvgLM-Z: FedAvg with heavy-ball momentum inside the clients.

Baselines of arXiv 2102.03970. LM starts every round from the average of the clients' buffers, which costs a second
vector each way; LM-Z starts from zero and costs nothing. local_momentum 0 is FedAvg. With a constant gradient and P
steps the zeroed buffer gains gamma = [1 - mu (1 - mu^P) / (P (1 - mu))] / (1 - mu), the averaged one 1 / (1 - mu):
compare methods at equal lr times gain.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


@method(
    "federate",
    "fedavg_lm",
    paper="2102.03970",
    summary="local momentum, buffer averaged every round (double traffic)",
    aliases=("fedavglm",),
)
class FedAvgLM(DoubleMomentum):
    local_buffer = "average"
    normalised = False

    class Options(Named):
        name: Literal["fedavg_lm"] = "fedavg_lm"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        local_momentum: float = Field(0.9, ge=0, lt=1, description="Local momentum constant mu_l (heavy ball).")


@method("federate", "fedavg_lm_z", paper="2102.03970", summary="local momentum, buffer set to zero every round", aliases=("fedavglm_z",))
class FedAvgLMZ(DoubleMomentum):
    normalised = False

    class Options(Named):
        name: Literal["fedavg_lm_z"] = "fedavg_lm_z"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        local_momentum: float = Field(0.9, ge=0, lt=1, description="Local momentum constant mu_l (heavy ball).")
