"""DOMO and DOMO-S: two momenta, coordinated by letting the server's momentum move the local models.

Paper: arXiv 2102.03970 (AAAI 2022); equations (1) to (6) in ``double_momentum.py``. DOMO moves the local start by
eta beta P m_r (2); DOMO-S scatters the same move over the local steps (4). b starts from zero, d_k is the mean of b:

    DOMO:     y = x_r - eta beta P m_r;   P times: b <- mu_l b + g_k(y),  y <- y - eta b
    DOMO-S:   y = x_r;                    P times: b <- mu_l b + g_k(y),  y <- y - eta b - eta beta m_r
    server:   m_{r+1} = mu_s m_r + sum p_k d_k;   x_{r+1} = x_r - alpha eta P m_{r+1}

Clients infer m_r from two models in a row, so neither sends a number more than FedAvg; when clients may miss rounds the server
sends m_r (ours). ``adaptive`` (ours): beta_r = beta * clip(cos(m_r, mean d_{r-1}), 0, 1), one number more in every plan.

Limits: beta 0 is FedAvgSLM-Z; the first round equals FedAvgSLM-Z for any beta; P = 1 makes DOMO-S equal FedAvgSLM-Z;
beta = alpha mu_s (the default) is an outer Nesterov step on the moved points. Fusion speeds up but does not move the
fixed points: for the true optimum under heterogeneous clients see ``domo_cv``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Plan, Round, State, Traffic
from xutrain.methods.federate.double_momentum import DoubleMomentum
from xutrain.registry import Named, method


class FusionOptions(Named):
    """Options that DOMO and its variants share."""

    server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum constant mu_s.")
    local_momentum: float = Field(0.9, ge=0, lt=1, description="Local momentum constant mu_l.")
    beta: float | None = Field(None, ge=0, description="Momentum fusion constant; null is server_lr * server_momentum (outer Nesterov).")
    adaptive: bool = Field(
        False, description="Scale beta each round by how well the server momentum agrees with the last direction (ours)."
    )


class Fusion(DoubleMomentum):
    """DOMO with the start moved; ``fusion`` tells the variants apart."""

    fusion: ClassVar[Literal["none", "pre", "intra"]] = "pre"
    follows = True

    def server_state(self, model: Tensor) -> State:
        return {**super().server_state(model), "beta": 0.0}

    def beta(self, plan: Plan) -> float:
        return plan.numbers["beta"] if self.options.adaptive else self.full_beta(plan)

    def full_beta(self, holder: Round | Plan) -> float:
        """beta, or alpha mu_s when the recipe leaves it open."""
        if self.options.beta is None and "beta" not in holder.knobs:
            return self.value(holder, "server_lr") * self.value(holder, "server_momentum")
        return self.value(holder, "beta")

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        if self.options.adaptive:
            plan.numbers["beta"] = server["beta"]
        return plan

    def advance(self, server: State, round: Round, mean: dict[str, Tensor]) -> None:
        super().advance(server, round, mean)
        if self.options.adaptive:
            agreement = cosine(server["momentum"], mean["update"])
            server["beta"] = self.full_beta(round) * min(max(agreement, 0.0), 1.0)

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        traffic = super().traffic(numel, previous_lr)
        if self.options.adaptive:
            traffic.down["beta"] = 1
        return traffic


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors, 0 when one of them is zero."""
    norms = float(torch.linalg.vector_norm(a)) * float(torch.linalg.vector_norm(b))
    return float(torch.dot(a, b)) / norms if norms > 0 else 0.0


@method("federate", "domo", paper="2102.03970", summary="server momentum moves the start of the local steps (outer Nesterov)")
class Domo(Fusion):
    class Options(FusionOptions):
        name: Literal["domo"] = "domo"

    options: Any


@method("federate", "domo_s", paper="2102.03970", summary="server momentum scattered over the local steps")
class DomoS(Fusion):
    fusion = "intra"

    class Options(FusionOptions):
        name: Literal["domo_s"] = "domo_s"

    options: Any
