"""Pipelines that empty after every batch: GPipe and 1F1B as torch.distributed.pipelining runs them, one stage a process.

In one process the same micro-batches pass one after another; the gradient is the same up to the order of additions.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from xutrain.data.base import Batch
from xutrain.engine.pace import Pace
from xutrain.engine.pipes import PeerLost
from xutrain.engine.statistics import frozen_statistics
from xutrain.errors import Issue, UsageError

if TYPE_CHECKING:
    from xutrain.methods.pipeline.base import Stage


class _Linger(torch.autograd.Function):
    """Identity whose backward takes a nominal time: it is the first thing that a block's backward meets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, micro: MicroBlock) -> Tensor:
        ctx.micro = micro
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with ctx.micro.work(2.0):
            return grads[0], None


class MicroBlock(nn.Module):
    """A stage's block as seen by one micro-batch after another: own randomness each, recomputed on the way back if asked."""

    def __init__(self, stage: Stage, micro_batches: int, recompute: bool, pace: Pace) -> None:
        super().__init__()
        self.block = stage.block
        self.stage, self.micro_batches, self.recompute, self.pace = stage, micro_batches, recompute, pace
        self.batch, self.seen = 0, 0

    def begin(self, batch: int) -> None:
        self.batch, self.seen = batch, 0

    def work(self, units: float) -> Any:
        return self.pace.work(units / self.micro_batches, self.stage.index, self.batch)

    def forward(self, x: Tensor) -> Tensor:
        index = self.batch * self.micro_batches + self.seen
        self.seen += 1
        if self.recompute:
            with set_checkpoint_early_stop(False):  # a padded recomputation takes its whole time
                y = checkpoint(self._pass, x, index, use_reentrant=False, context_fn=self._contexts)
        else:
            y = self._pass(x, index)
        assert isinstance(y, Tensor)
        lingered: Tensor = _Linger.apply(y, self)  # type: ignore[no-untyped-call]
        return lingered

    def _pass(self, x: Tensor, index: int) -> Tensor:
        with self.work(1.0):
            return self.stage.call(x, index)

    def _contexts(self) -> tuple[Any, Any]:
        """Batch-norm statistics count in the first pass only."""
        return nullcontext(), frozen_statistics(self.block)


class Flush:
    """Runs whole batches through the schedule of ``method.flush``; leaves averaged gradients in the stages' parameters."""

    def __init__(self, job: Any, pace: Pace) -> None:
        options = job.method.options
        self.job, self.count = job, options.micro_batches
        self.blocks = [MicroBlock(stage, self.count, options.recompute, pace) for stage in job.stages]
        self.schedule: Any = None
        workers = job.workers
        if workers.processes == 1:
            return
        if workers.processes != workers.count:
            hint = f"--nproc {workers.count}, or --nproc 1"
            raise UsageError(Issue("--nproc", f"{options.name} runs one stage a process, or all in one", workers.processes, hint))
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        stage = PipelineStage(self.blocks[0], workers.rank, workers.count, job.ctx.device)
        schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[job.method.flush]
        self.schedule = schedule(stage, n_microbatches=self.count, loss_fn=self._loss)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.job.task.loss(outputs, Batch(targets, targets))

    def step(self, batch: int) -> None:
        """All micro-batches of ``batch``, up and down. Appends the mean loss to the last stage's losses."""
        for block in self.blocks:
            block.begin(batch)
        first, last = self.job.stages[0], self.job.stages[-1]
        if self.schedule is None:
            data = self.job.batch(batch)
            losses = []
            for inputs, targets in zip(data.inputs.chunk(self.count), data.targets.chunk(self.count), strict=True):
                for block in self.blocks:
                    inputs = block(inputs)
                losses.append(self._loss(inputs, targets))
                (losses[-1] / self.count).backward()  # type: ignore[no-untyped-call]
            self.job.drawn.clear()  # inputs and targets were both used
        else:
            losses = self._scheduled(first, last, batch)
        if last.last:
            last.losses.append((batch, sum(float(loss.detach()) for loss in losses) / self.count))

    def _scheduled(self, first: Stage, last: Stage, batch: int) -> list[Tensor]:
        losses: list[Tensor] = []
        try:
            if first.first:
                self.schedule.step(self.job.batch(batch).inputs, return_outputs=False)
            elif last.last:
                self.schedule.step(target=self.job.batch(batch).targets, losses=losses, return_outputs=False)
            else:
                self.schedule.step(return_outputs=False)
        except RuntimeError as reason:
            if "onnection" in str(reason):
                raise PeerLost(f"micro-batches of batch {batch}", None, str(reason).splitlines()[0]) from reason
            raise
        return losses
