"""Stages with different staleness: pipeline, every method and every baseline, in one loop.

One process may host all stages (the simulator), one, or a few: what iteration n of stage k computes depends on (k, n)
alone, so the numbers are the same bit for bit, however the stages are spread and however late a message comes.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from xutrain.engine.checkpoint import Checkpoints, Saved
from xutrain.engine.context import Context
from xutrain.engine.flush import Flush
from xutrain.engine.pace import Pace
from xutrain.engine.pipes import Pipes
from xutrain.engine.pulse import Pulse
from xutrain.engine.record import Record
from xutrain.engine.schedule import factor
from xutrain.engine.stop import Stop
from xutrain.errors import Diverged, Issue, Stopped, UsageError
from xutrain.launch.plan import Forecast
from xutrain.loops.pipeline_job import Job, build, evaluate, restore_stage, stage_state
from xutrain.loops.pipeline_ledger import Ledger
from xutrain.methods.pipeline.base import Applied, Stage
from xutrain.methods.pipeline.timing import units_per_batch


def run(recipe: Any, ctx: Context, record: Record) -> dict[str, float]:
    """Train, measure, record; returns the final metrics.

    Raises:
        Diverged: the loss is not finite.
        Stopped: asked to stop; the state, queues included, is saved.
        Failed: another process ended; says which, in which iteration and why.
    """
    with Pulse(record.folder, ctx.rank, ctx.processes, recipe.stages // ctx.processes) as pulse:
        return Pipeline(recipe, ctx, record, pulse).train()


def forecast(recipe: Any) -> Forecast:
    """Ticks and bits of a recipe in closed form; equal to the meter's count afterwards."""
    job = build(recipe, Context(recipe.seed))
    delays, segments = job.method.delays, segments_of(recipe, job.steps, job.steps_per_epoch)
    bits = 2 * job.steps * sum(m.bits for m in job.messages)
    per_stage = [sum(p.numel() for p in stage.block.parameters()) for stage in job.stages]
    details = {
        "parameters": sum(per_stage),
        "parameters_per_stage": per_stage,
        "layers_per_stage": [b - a for a, b in zip(job.bounds, job.bounds[1:], strict=False)],
        "steps_per_epoch": job.steps_per_epoch,
        "delays": {"p": list(delays.p), "m": list(delays.m), "q": list(delays.q)},
        "staleness": list(delays.answers),
        "ticks": sum(delays.drained(stop - start) for start, stop in segments),
        "drains": len(segments),
        "boundary_bits_per_batch": [m.bits for m in job.messages],
        "units_per_batch": units_per_batch(job.method, recipe.stages),
    }
    return Forecast(job.steps, bits, bits, recipe.stages, details)


def drain_every(recipe: Any, per_epoch: int) -> int | None:
    """Batches between two drains of the queues; None: only the end."""
    found: dict[str, int | None] = {"end": None, "checkpoint": recipe.checkpoint.every, "epoch": per_epoch}
    return found[recipe.runtime.drain]


def segments_of(recipe: Any, steps: int, per_epoch: int) -> list[tuple[int, int]]:
    """Ranges of batches after which the queues run empty."""
    every = drain_every(recipe, per_epoch)
    cuts = list(range(every, steps, every)) if every else []
    return list(zip([0, *cuts], [*cuts, steps], strict=True))


class Pipeline:
    """One process's part of a run.

    Attributes:
        start, size: the segment of batches that is under way; ``tick`` counts its ticks.
    """

    def __init__(self, recipe: Any, ctx: Context, record: Record, pulse: Pulse) -> None:
        self.recipe, self.ctx, self.record, self.pulse = recipe, ctx, record, pulse
        self.checkpoints = Checkpoints(record.folder, recipe.checkpoint, ctx, record.note)
        self.stop = Stop(record.folder, ctx, every=recipe.runtime.poll)
        self.saved = self.checkpoints.latest()
        if self.saved is None:
            record.rewind(-1)  # what a run wrote that was killed before its first checkpoint
        self.job: Job = build(recipe, ctx, self.saved.shared["bounds"] if self.saved else None)
        self.method, self.delays = self.job.method, self.job.method.delays
        self.late = self.method.late and recipe.runtime.take == "late"
        self.pace = Pace(recipe.runtime.unit_ms, recipe.straggler)
        self.pipes = Pipes(ctx, self.job.workers, self.delays, self.job.messages)
        self.flush = Flush(self.job, self.pace) if self.method.flush else None
        self.ledger = Ledger(self.delays)
        self.start, self.size, self.tick, self.counted = 0, 0, 0, 0
        self.iterations, self.busy_s, self.trained = 0, 0.0, 0
        every_epochs = recipe.eval.every_epochs
        self.eval_every = recipe.eval.every or (max(1, round(every_epochs * self.job.steps_per_epoch)) if every_epochs else None)
        if recipe.optimizer.name == "adam":
            more = "; nesterov is left aside" if recipe.optimizer.nesterov else ""
            record.note(f"adam is outside the paper's analysis, which covers SGD and momentum SGD{more}")

    def train(self) -> dict[str, float]:
        job, steps = self.job, self.job.steps
        resumed = self._restore(self.saved) if self.saved else 0
        for start, stop in segments_of(self.recipe, steps, job.steps_per_epoch):
            if start < self.start:
                continue  # before the checkpoint
            self._segment(start, stop, self.tick if start == self.start else 0)
            if stop < steps:
                self._at(stop, drained=True)
        metrics = {f"{split}_{name}": value for split in ("train", "test") for name, value in evaluate(job, self.pipes, split).items()}
        if resumed < steps or self.saved is None:
            self.record.log(steps, metrics, epoch=steps / job.steps_per_epoch)
            self._save(steps, steps, 0)
            self.ledger.write(job, self.record, self.trained, self.busy_s)
        return metrics

    def _segment(self, start: int, stop: int, first: int) -> None:
        """Ticks ``first``.. of the segment, to the last update of the last stage that is behind."""
        self.start, self.size, self.tick, self.counted = start, stop - start, first, first
        self.pipes.begin(first, self.size)
        for n in range(first, self.delays.drained(self.size)):
            done = self._done(n)
            if n % self.recipe.runtime.poll == 0:
                self._report(n)
            if self.stop.requested(done):
                self._report(n)
                self._save(done, start, n)
                raise Stopped(Issue(str(self.record.folder), f"stopped after step {done} of {self.job.steps}", has_value=False))
            self.pulse.beat(self.iterations)
            began = time.perf_counter()
            self._tick(n)
            self.busy_s += time.perf_counter() - began
            self.iterations, self.tick, now = self.iterations + 1, n + 1, self._done(n + 1)
            if done < now < stop:
                self.trained += 1
                self._at(now, drained=False)
            elif done < now:
                self.trained += 1
        self.pipes.settle()
        self._report(self.tick)
        self.pipes.check(self.size if self.flush is None else 0)

    def _done(self, ticks: int) -> int:
        """Batches that the last stage has finished after ``ticks`` ticks of the segment."""
        return self.start + min(max(ticks - self.delays.lags[-1], 0), self.size)

    def _tick(self, n: int) -> None:
        """Iteration n of every hosted stage: forwards ascending, backwards descending."""
        if self.flush is not None:
            self.flush.step(self.start + n)
            for stage in self.job.stages:
                self._refuse_non_finite(stage, self.start + n)
                stage.applied.append(Applied(stage.index, self.start + n, stage.updates, stage.updates, stage.updates))
                with self.pace.beside(stage.index):
                    self._update(stage, self.start + n)
            return
        self.pipes.expect(n + 1, self.size)
        waiting = []
        forward_units, backward_units = self.method.cost if self.recipe.runtime.take == "late" else (sum(self.method.cost), 0)
        for stage in self.job.stages:
            k, g = stage.index, None
            f, b = self._batch(n - self.delays.lags[k]), self._batch(n - self.delays.lags[k] - self.delays.m[k])
            if f is not None:
                with self.pace.beside(k):
                    data = self.job.batch(f).inputs if stage.first else None
                x = data if data is not None else self.pipes.activations[k - 1].take()
            if b is not None and not stage.last and not self.late and self.delays.q[k]:
                g = self.pipes.gradients[k].take()
            if f is not None:
                with self.pace.work(forward_units, k, n):
                    h = self.method.forward(stage, f, x)
                if h is not None:
                    self.pipes.activations[k].put(h)
            waiting.append((stage, f, b, g))
        for stage, f, b, g in reversed(waiting):
            if b is not None and not stage.last and g is None:
                g = self.pipes.gradients[stage.index].take()
            with self.pace.work(backward_units, stage.index, n):
                down = self.method.backward(stage, f, b, g)
            self._refuse_non_finite(stage, f)
            if down is not None and not stage.first:
                self.pipes.gradients[stage.index - 1].put(down)
            target = self.method.target(stage, f, b)
            if target is not None:
                with self.pace.beside(stage.index):
                    self._update(stage, target)

    def _batch(self, index: int) -> int | None:
        return self.start + index if 0 <= index < self.size else None

    def _update(self, stage: Stage, batch: int) -> None:
        """Apply the gradient of ``batch`` at that batch's learning rate, whatever the stage's staleness."""
        clip = self.recipe.train.clip_norm
        if stage.optimizer is not None:
            for group in stage.optimizer.param_groups:
                group["lr"] = self._lr(batch) * self.method.rate(stage, batch)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(list(stage.parameters.values()), clip)
            stage.optimizer.step()
            stage.optimizer.zero_grad(set_to_none=True)
        stage.updates += 1
        self.method.applied(stage)
        self.ledger.take(stage, self.start)

    def _lr(self, batch: int) -> float:
        return float(self.recipe.optimizer.lr * factor(self.recipe.schedule, batch, self.job.steps, self.job.steps_per_epoch))

    def _refuse_non_finite(self, stage: Stage, batch: int | None) -> None:
        value = stage.losses[-1][1] if stage.losses else 0.0
        if not math.isfinite(value):
            place = self.pulse.place(self.ctx.rank, self.iterations)
            hint = "lower optimizer.lr, set train.clip_norm, warm up, or choose smaller delays"
            raise Diverged(Issue(place, f"the loss of batch {batch} is not finite", value, hint))

    def _at(self, done: int, *, drained: bool) -> None:
        """What is due when the last stage has finished ``done`` batches: a measurement, a checkpoint."""
        if self.eval_every and done % self.eval_every == 0:
            self._report(self.tick)
            values = {f"test_{name}": value for name, value in evaluate(self.job, self.pipes, "test").items()}
            self.record.log(done, values, epoch=done / self.job.steps_per_epoch)
        if self.checkpoints.due(done) and (drained or self.recipe.runtime.drain != "checkpoint"):
            self._report(self.tick)
            self._save(done, *((done, 0) if drained else (self.start, self.tick)))

    def _report(self, ticks: int) -> None:
        """Write the losses known so far, each with the bits that had crossed when it was computed."""
        every, per_epoch = self.recipe.log.every, self.job.steps_per_epoch
        known = self.job.workers.objects([stage.losses for stage in self.job.stages])[-1]
        for stage in self.job.stages:
            stage.losses = []
        for batch, loss in known:
            done = batch + 1
            if done % every == 0 or done == self.job.steps:
                self._count(done - self.start + self.delays.lags[-1])
                self.record.log(done, {"batch_loss": loss, "lr": self._lr(batch)}, split="train", epoch=done / per_epoch)
                self.record.progress(done, self.job.steps, loss=loss)
        self._count(ticks)

    def _count(self, ticks: int) -> None:
        """Bits of all boundaries up to ``ticks`` ticks of the segment, in closed form: the same on every process."""
        for k, message in enumerate(self.job.messages):
            now, before = self.delays.sent(k, ticks, self.size), self.delays.sent(k, self.counted, self.size)
            for part, count in (("activations", now[0] - before[0]), ("gradients", now[1] - before[1])):
                self.ctx.meter.add(part, up=count * message.bits, down=count * message.bits)
        self.counted = ticks

    def _save(self, step: int, start: int, tick: int) -> None:
        """Save every hosted stage with what is in flight towards it."""
        up, down = self.pipes.drain()
        self.pipes.settle()
        states = {
            s.index: {**stage_state(s, self.method, up.get(s.index, []), down.get(s.index, [])), "ledger": self.ledger.state(s.index)}
            for s in self.job.stages
        }
        shared = {"start": start, "tick": tick, "bounds": self.job.bounds, "iterations": self.iterations, "meter": self.ctx.meter.state()}
        shared["drain_every"] = drain_every(self.recipe, self.job.steps_per_epoch)
        self.checkpoints.save(step, shared=shared, workers=states, model=self.job.state_dict())

    def _restore(self, saved: Saved) -> int:
        shared, every = saved.shared, drain_every(self.recipe, self.job.steps_per_epoch)
        if (began := shared.get("drain_every", every)) != every:  # a checkpoint of an earlier version does not say
            what = f"the run began with {began}; where its queues drain is part of what it computes (runtime.drain=checkpoint)"
            hint = f"checkpoint.every={'null' if began is None else began} goes on; --fresh begins anew"
            raise UsageError(Issue("checkpoint.every", what, every, hint))
        self.start, self.tick, self.iterations = shared["start"], shared["tick"], shared["iterations"]
        self.ctx.meter.load_state(shared["meter"])
        for stage in self.job.stages:
            state = saved.worker(stage.index)
            restore_stage(stage, self.method, self.pipes, state)
            self.ledger.load_state(stage.index, state["ledger"])
        self.record.rewind(saved.step)
        self.record.note(f"resumed from step {saved.step} of {self.job.steps}")
        return saved.step
