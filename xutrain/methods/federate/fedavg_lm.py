"""FedAvgLM and FedAvgLM-Z: FedAvg with heavy-ball momentum inside the clients.

Baselines of arXiv 2102.03970. The local steps of a round start with y = x and the buffer b = b_0:

    P times: b <- mu_l b + g_k(y),  y <- y - eta b;      x <- x + alpha sum p_k (y_k - x)
    LM:      b_0 = sum p_k b_k, the buffers at the end of the round before
    LM-Z:    b_0 = 0

LM starts every round from the average of the clients' buffers, which costs a second vector each way; LM-Z starts from zero and
costs nothing. With a constant gradient and P steps the zeroed buffer gains gamma = [1 - mu (1 - mu^P) / (P (1 - mu))] / (1 - mu),
the averaged one 1 / (1 - mu): compare methods at equal lr times gain.

Limits: local_momentum 0 is FedAvg; P = 1 makes LM-Z equal FedAvg, and LM heavy-ball SGD on the mean gradient.
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
