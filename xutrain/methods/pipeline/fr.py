"""FR: Features Replay (Huo, Gu, Huang, NeurIPS 2018; official code slowbull/FeaturesReplay).

    h_{k+1} = F_k(h_k; w_k^s),    s = max(0, b - (K-1-k))
    G_k(b) = (dF_k/dw_k at (h_k, w_k^b))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k^b))^T g_{k+1}
    w_k^{b+1} = step(w_k^b, G_k(b))

w_k^v as in DSP. Iteration t forwards batch t through all stages, then every stage k goes backward on batch t-(K-1-k) with the
error gradient received in iteration t-1, recomputing its forward with the present weights. Staleness K-1-k, half of DSP's
least, at the price of a forward pass that runs through all stages in one tick.

Limits: one stage is back-propagation; it is DSP's arithmetic with p = 0, q = 1.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from xutrain.methods.pipeline.base import Stage
from xutrain.methods.pipeline.dsp import Replay
from xutrain.recipe.delays import Delays, delayed
from xutrain.registry import Named, method


@method("pipeline", "fr", paper="1807.04511", summary="features replay: locked forward, delayed error gradients, inputs only")
class FR(Replay):
    late = False

    class Options(Named):
        name: str = "fr"
        first_block_lr_mult: float = Field(1.0, gt=0, le=100, description="learning-rate factor of stage 0; the official code passes 2")

        def delays(self, stages: int) -> Delays:
            return delayed(stages)

    options: Any

    def rate(self, stage: Stage, batch: int) -> float:
        return float(self.options.first_block_lr_mult) if stage.first and not stage.last else 1.0
