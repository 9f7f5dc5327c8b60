"""Keep the experts that the router uses most: importance = number of routed calibration tokens.

    S_e = #{ t : e in top-k(t) };    the ``keep`` experts with the largest S_e stay, of equal ones the first

Limits: keep = n drops nothing; where every output has the same norm, EAN has the same order.
"""

from __future__ import annotations

from torch import Tensor

from xutrain.methods.prune.drop import ExpertMethod, LayerView
from xutrain.methods.prune.load_balance import loads
from xutrain.registry import method


@method("prune", "frequency", summary="drop the least used experts")
class Frequency(ExpertMethod):
    class Options(ExpertMethod.Options):
        pass

    def importance(self, view: LayerView) -> Tensor:
        return loads(view.routing)["topk"].double()
