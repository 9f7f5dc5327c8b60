"""GPipe and 1F1B: a batch in micro-batches fills and empties the pipeline; one update, no staleness.

    G = (1/M) sum_{i=1..M} dL_i/dw at w,    w <- step(w, G)        gpipe and 1f1b: L_i is the loss of micro-batch i

Huang et al., NeurIPS 2019 (GPipe: all forwards, then all backwards, recomputation); Narayanan et al. (1F1B: one forward, one
backward in turn, fewer activations alive). torch.distributed.pipelining runs both; neither is rewritten here. Without batch
norm and dropout the gradient is back-propagation's up to rounding; batch-norm statistics are those of micro-batches.

Limits: one micro-batch is back-propagation (1F1B takes it with one stage only).
"""

from __future__ import annotations

from pydantic import Field

from xutrain.errors import Issue
from xutrain.methods.pipeline.base import PipelineMethod
from xutrain.recipe.delays import Delays, locked
from xutrain.registry import Named, method


class MicroBatches(Named):
    micro_batches: int = Field(4, ge=1, description="M, equal parts of a batch; seconds per batch fall with (M+K-1)/M")
    recompute: bool = Field(True, description="recompute a block's forward on the way back instead of keeping its activations")

    def delays(self, stages: int) -> Delays:
        return locked(stages)

    def issues(self, stages: int, batch_size: int) -> list[Issue]:
        """What must fit the rest of the recipe."""
        if batch_size % self.micro_batches:
            near = [m for m in range(1, batch_size + 1) if batch_size % m == 0 and m >= self.micro_batches][:1]
            hint = f"method.micro_batches={near[0]}, or another batch size"
            return [Issue("method.micro_batches", f"does not divide train.batch_size={batch_size}", self.micro_batches, hint)]
        return []


@method("pipeline", "gpipe", paper="1811.06965", summary="GPipe: micro-batches fill and empty the pipeline, one update a batch")
class GPipe(PipelineMethod):
    flush = "gpipe"

    class Options(MicroBatches):
        name: str = "gpipe"


@method(
    "pipeline", "1f1b", paper="1806.03377", summary="1F1B with a flush: as GPipe, fewer activations alive", aliases=("pipedream_flush",)
)
class OneForwardOneBackward(PipelineMethod):
    flush = "1f1b"

    class Options(MicroBatches):
        name: str = "1f1b"
        recompute: bool = Field(False, description="recompute a block's forward on the way back instead of keeping its activations")

        def issues(self, stages: int, batch_size: int) -> list[Issue]:
            found = super().issues(stages, batch_size)
            if self.micro_batches < stages:
                what = f"1F1B needs at least as many micro-batches as stages={stages}"
                found.append(Issue("method.micro_batches", what, self.micro_batches, f"method.micro_batches={stages}"))
            return found
