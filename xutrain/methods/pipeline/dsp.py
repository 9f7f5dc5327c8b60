"""DSP: diversely stale parameters, layer-wise staleness (arXiv 1909.02625).

    h_{k+1} = F_k(h_k; w_k^s),    s = max(0, b - m_k)
    G_k(b) = (dF_k/dw_k at (h_k, w_k^b))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k^b))^T g_{k+1}
    w_k^{b+1} = step(w_k^b, G_k(b))

w_k^v are stage k's weights after v updates; batches and updates count from where the queues were last empty. Every stage
forwards one batch and goes backward on an older one in each iteration; it keeps only the inputs of the batches between, and
recomputes its forward with the weights of the backward pass. h_k came through the older weights of the stages below.

Limits: one stage is plain SGD; lr = 0 gives exactly the gradient of back-propagation; the gap to it is of first order in lr.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.pipeline.base import Applied, Kept, PipelineMethod, Stage, frozen_statistics
from xutrain.recipe.delays import Delays, dsp
from xutrain.registry import Named, method


class Replay(PipelineMethod):
    """Keeps inputs, recomputes with the present weights."""

    cost = (1, 3)

    def forward(self, stage: Stage, f: int, x: Tensor) -> Tensor | None:
        stage.keep(Kept(f, stage.updates, x.detach()))
        if stage.last:
            return None  # forward and recomputation are one pass, made with the loss
        with torch.no_grad(), frozen_statistics(stage.block):
            return stage.call(x, f)

    def backward(self, stage: Stage, f: int | None, b: int | None, g: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        kept = stage.release(b)
        leaf = stage.leaf(kept.inputs)
        weights = self.weights(stage)
        stage.applied.append(Applied(stage.index, b, kept.version, stage.updates, stage.updates))
        return stage.pull(stage.call(leaf, b, weights), leaf, b, g, weights)  # this pass updates batch-norm statistics

    def weights(self, stage: Stage) -> dict[str, Tensor] | None:
        """The weights of the recomputation; None: the block's own."""
        return None


@method("pipeline", "dsp", paper="1909.02625", summary="diversely stale parameters: every stage on another batch, no locking, inputs only")
class DSP(Replay):
    class Options(Named):
        name: str = "dsp"
        p: list[int] | None = Field(None, description="forward delays in ticks, one per stage, the last 0; default all 1")
        m: list[int] | None = Field(None, description="staleness of each stage, the last 0; default the smallest valid")
        q: list[int] | None = Field(None, description="instead of m: backward delays in ticks, one per boundary")
        lr_stale: str = Field(
            "none", pattern="^(none|inverse)$", description="inverse: stage k's learning rate is divided by 1 + m_k (not in the paper)"
        )

        def delays(self, stages: int) -> Delays:
            return dsp(self.p, self.q, self.m, stages)

    options: Any

    def rate(self, stage: Stage, batch: int) -> float:
        return 1.0 / (1 + self.delays.m[stage.index]) if self.options.lr_stale == "inverse" else 1.0
