"""BP: back-propagation as sequential model parallelism; one stage is busy at a time.

All delays are 0: batch b goes up through all stages and down again before batch b+1 starts. Bit-equal to training the
uncut network on one process.
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
