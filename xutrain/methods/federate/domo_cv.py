"""DOMO with control variates: DOMO's speed, the true optimum as its limit. Ours, not in the paper.

Local steps of DOMO (``double_momentum.py``) along g_k(y) - c_k + c, c_k the mean raw gradient of the client's last round
(``control.py``):

    y = x - eta beta P m;   P times: b <- mu_l b + g_k(y) - c_k + c,  y <- y - eta b
    m <- mu_s m + sum p_k d_k;   x <- x - alpha eta P m
    c_k <- mean of g_k(y) along the path;   c = sum of p_k c_k over all clients

b starts from zero in every round, d_k is its mean over the steps. Traffic: two vectors each way.

Limits: both momenta and beta 0 is SCAFFOLD (option II; equal P_k); the first round is DOMO's. It ends at argmin of sum p_k F_k.
"""

from __future__ import annotations

from typing import Any, Literal

from xutrain.methods.federate.control import Controlled
from xutrain.methods.federate.domo import Fusion, FusionOptions
from xutrain.registry import method


@method("federate", "domo_cv", summary="DOMO with control variates: its limit is the true optimum (ours)")
class DomoCV(Controlled, Fusion):
    class Options(FusionOptions):
        name: Literal["domo_cv"] = "domo_cv"

    options: Any
