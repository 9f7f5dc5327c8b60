"""DDG: decoupled parallel back-propagation with delayed gradients (Huo, Gu, Yang, Huang, ICML 2018; code slowbull/DDG).

    h_{k+1} = F_k(h_k; w_k^s),    s = max(0, b - (K-1-k))
    G_k(b) = (dF_k/dw_k at (h_k, w_k^s))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k^s))^T g_{k+1}
    w_k^{b+1} = step(w_k^b, G_k(b))

w_k^v are stage k's weights after v updates; batches and updates count from where the queues were last empty. Same schedule as
FR, but a stage keeps the graph of each forward pass, so a gradient is taken at the weights that forwarded its batch. Modern
autograd refuses to go backward through weights that an optimizer has changed in place, so the graph is built on a copy of the
weights (K-1-k copies). ``mix`` is what the official code computes on its old torch: stored activations are old, the weights in
the Jacobian are new.

Limits: one stage is back-propagation; at lr = 0 it equals FR.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.pipeline.base import Applied, Kept, PipelineMethod, Stage, frozen_statistics
from xutrain.recipe.delays import Delays, delayed
from xutrain.registry import Named, method


class Stash(PipelineMethod):
    """Keeps the graph of each forward pass, built on a copy of the weights."""

    mix = False

    def forward(self, stage: Stage, f: int, x: Tensor) -> Tensor | None:
        kept = Kept(f, stage.updates, x.detach(), weights=stage.clone())
        self._trace(stage, kept)
        stage.keep(kept)
        assert kept.outputs is not None
        return None if stage.last else kept.outputs.detach()

    def backward(self, stage: Stage, f: int | None, b: int | None, g: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        kept = stage.release(b)
        assert kept.outputs is not None and kept.leaf is not None and kept.weights is not None
        if self.mix:  # the saved tensors share this memory, and ``.data`` hides the write from autograd
            for name, parameter in stage.parameters.items():
                kept.weights[name].data.copy_(parameter.detach())
        version = stage.updates if self.mix else kept.version
        stage.applied.append(Applied(stage.index, b, kept.version, version, stage.updates))
        return stage.pull(kept.outputs, kept.leaf, b, g, kept.weights)

    def rebuild(self, stage: Stage, kept: Kept) -> None:
        with frozen_statistics(stage.block):
            self._trace(stage, kept)

    def _trace(self, stage: Stage, kept: Kept) -> None:
        kept.leaf = stage.leaf(kept.inputs)
        with torch.enable_grad():
            kept.outputs = stage.call(kept.leaf, kept.batch, kept.weights)


@method("pipeline", "ddg", paper="1804.10574", summary="delayed gradients: locked forward, graphs kept at the forward's weights")
class DDG(Stash):
    late = False

    class Options(Named):
        name: str = "ddg"
        mix: bool = Field(False, description="old activations with new weights in the Jacobian, as the official code computes")

        def delays(self, stages: int) -> Delays:
            return delayed(stages)

    def __init__(self, options: Any, stages: int) -> None:
        super().__init__(options, stages)
        self.mix = options.mix
