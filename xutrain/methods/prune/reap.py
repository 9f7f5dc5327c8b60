"""REAP (arXiv:2510.13999): importance = mean over routed tokens of g ||E(x)||_2, with the weights g that the model applies.

    S_e = (1 / n_e) sum_{t routed to e} g_t ||E_e(x_t)||_2;    the ``keep`` experts with the largest S_e stay, of equal ones the first

n_e is the number of tokens routed to e. An expert without tokens has importance zero.

Limits: g = 1 is EAN's sum divided by n_e; keep = n drops nothing.
"""

from __future__ import annotations

from torch import Tensor

from xutrain.methods.prune.drop import ExpertMethod, LayerView
from xutrain.registry import method


@method("prune", "reap", paper="2510.13999", summary="drop the experts with the smallest router-weighted mean output norm")
class REAP(ExpertMethod):
    class Options(ExpertMethod.Options):
        pass

    def importance(self, view: LayerView) -> Tensor:
        return view.per_expert(lambda g, out: (g * out.norm(dim=1)).sum() / max(1, len(g)))
