"""PipeDream's weight stashing in the steady state of 1F1B (Harlap et al. 2018; Narayanan et al., SOSP 2019).

Stage k goes backward on a batch with the weight version that forwarded it, and applies the update to the newest. In
steady state it has K-1-k batches between forward and backward. Its gradients are those of DDG (a test holds them
bit-equal); what differs is time: a stage forwards the next batch before it waits for an error gradient.
Limit: one stage is back-propagation.
"""

from __future__ import annotations

from xutrain.methods.pipeline.ddg import Stash
from xutrain.recipe.delays import Delays, delayed
from xutrain.registry import Named, method


@method("pipeline", "pipedream", paper="1806.03377", summary="1F1B in steady state with weight stashing, no flush")
class PipeDream(Stash):
    class Options(Named):
        name: str = "pipedream"

        def delays(self, stages: int) -> Delays:
            return delayed(stages)
