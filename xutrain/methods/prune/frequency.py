"""Keep the experts that the router uses most: importance = number of routed calibration tokens."""

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
