"""BP: back-propagation as sequential model parallelism; one stage is busy at a time.

    h_{k+1} = F_k(h_k; w_k),    g_K = dL/dh_K
    G_k(b) = (dF_k/dw_k at (h_k, w_k))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k))^T g_{k+1}
    w_k <- step(w_k, G_k(b))

All delays are 0: batch b goes up through all stages and down again before batch b+1 starts. ``step`` is the recipe's optimizer.

Limits: one stage is plain training on one process; any number of stages is bit-equal to training the uncut network there, but
for dropout, whose masks each stage draws for itself, and for clipping, which goes by each stage's own norm.
"""

from __future__ import annotations

from torch import Tensor

from xutrain.methods.pipeline.base import Applied, Kept, PipelineMethod, Stage
from xutrain.recipe.delays import Delays, locked
from xutrain.registry import Named, method


@method("pipeline", "bp", summary="back-propagation: sequential model parallelism, no staleness", aliases=("sgd", "sequential"))
class BP(PipelineMethod):
    class Options(Named):
        name: str = "bp"

        def delays(self, stages: int) -> Delays:
            return locked(stages)

    def forward(self, stage: Stage, f: int, x: Tensor) -> Tensor | None:
        leaf = stage.leaf(x)
        outputs = stage.call(leaf, f)
        stage.keep(Kept(f, stage.updates, x.detach(), leaf=leaf, outputs=outputs))
        return None if stage.last else outputs.detach()

    def backward(self, stage: Stage, f: int | None, b: int | None, g: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        kept = stage.release(b)
        assert kept.outputs is not None and kept.leaf is not None
        stage.applied.append(Applied(stage.index, b, kept.version, stage.updates, stage.updates))
        return stage.pull(kept.outputs, kept.leaf, b, g)
