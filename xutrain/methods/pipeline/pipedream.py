"""PipeDream's weight stashing in the steady state of 1F1B (Harlap et al. 2018; Narayanan et al., SOSP 2019).

    h_{k+1} = F_k(h_k; w_k^s),    s = max(0, b - (K-1-k))
    G_k(b) = (dF_k/dw_k at (h_k, w_k^s))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k^s))^T g_{k+1}
    w_k^{b+1} = step(w_k^b, G_k(b))

Stage k goes backward on a batch with the weight version that forwarded it, and applies the update to the newest (w_k^v as in
DDG). In steady state it has K-1-k batches between forward and backward. Its gradients are those of DDG (a test holds them
bit-equal); what differs is time: a stage forwards the next batch before it waits for an error gradient.

Limits: one stage is back-propagation; at any number of stages the gradients are DDG's.
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
