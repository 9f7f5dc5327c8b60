"""EAN, expert activation norm: importance = sum over routed tokens of ||E(x)||_2, without the router's weight.

    S_e = sum_{t routed to e} ||E_e(x_t)||_2;    the ``keep`` experts with the largest S_e stay, of equal ones the first

Limits: keep = n drops nothing; an expert without tokens has importance zero.
"""

from __future__ import annotations

from torch import Tensor

from xutrain.methods.prune.drop import ExpertMethod, LayerView
from xutrain.registry import method


@method("prune", "ean", summary="drop the experts with the smallest total output norm")
class EAN(ExpertMethod):
    class Options(ExpertMethod.Options):
        pass

    def importance(self, view: LayerView) -> Tensor:
        return view.per_expert(lambda g, out: out.norm(dim=1).sum())
