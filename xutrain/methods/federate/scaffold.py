"""SCAFFOLD, options I and II: control variates against client drift.

Karimireddy et al., ICML 2020. c and all c_k start at zero; c is the sum of p_k c_k over all clients:

    P times from y_k = x:   y_k <- y_k - eta (g_k(y_k) - c_k + c);      x <- x + alpha sum p_k (y_k - x)
    option II:   c_k <- c_k - c + (x - y_k)/(P eta)
    option I:    c_k <- full gradient of F_k at x

Option II is the mean raw gradient along the path (so computed here, exact also for eta 0).

Limits: it ends at argmin of sum p_k F_k. All control variates kept at zero is FedAvg; so is the first round.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from xutrain.methods.federate.control import Controlled
from xutrain.registry import Named, method


@method("federate", "scaffold", paper="1910.06378", summary="control variates against client drift (double traffic)")
class Scaffold(Controlled):
    normalised = False
    adaptive = True

    class Options(Named):
        name: Literal["scaffold"] = "scaffold"
        server_lr: float = Field(1.0, gt=0, description="Server learning rate alpha.")
        option: Literal[1, 2] = Field(2, description="1: new control variate is the full gradient at x; 2: the mean along the path.")

    options: Any

    def refresh_rule(self) -> str:
        return "full_gradient" if self.options.option == 1 else "path"
