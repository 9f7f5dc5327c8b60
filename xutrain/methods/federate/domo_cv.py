"""DOMO with control variates: DOMO's speed, the true optimum as its limit. Ours, not in the paper.

Local steps of DOMO (``double_momentum.py``) along g_k(y) - c_k + c, c_k the mean raw gradient of the client's last round
(``control.py``). Both momenta and beta 0 is SCAFFOLD (option II). Traffic: two vectors each way.
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
