"""Data-parallel steps: quantize, sparsify and pretrain, every method and every baseline, in one loop."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xutrain import registry
from xutrain.data.base import Task
from xutrain.engine.checkpoint import Checkpoints, Saved
from xutrain.engine.context import Context
from xutrain.engine.evaluate import evaluate
from xutrain.engine.network import Link
from xutrain.engine.record import Record
from xutrain.engine.replica import Replica, clip_norm
from xutrain.engine.schedule import factor
from xutrain.engine.stop import Stop
from xutrain.engine.workers import Workers
from xutrain.errors import DataError, Diverged, Issue, RecipeError, Stopped
from xutrain.launch.plan import Forecast
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.exchange import Exchange, choose


@dataclass
class Job:
    """The parts of a run, built from its recipe."""

    task: Task
    replica: Replica
    workers: Workers
    exchange: Exchange
    method: DataParallel
    buffers: list[Tensor]
    steps: int
    steps_per_epoch: int
    accumulate: int


def build(recipe: Any, ctx: Context, task: Task | None = None) -> Job:
    """Data, model, codec and method of a recipe, equal on every process. ``task`` stands in for data that are not there."""
    task = task or registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    if recipe.workers * recipe.train.batch_size > task.num_train:
        hint = f"{recipe.workers} workers x {recipe.train.batch_size} samples; lower train.batch_size or workers"
        raise RecipeError(
            Issue("train.batch_size", f"a global batch is larger than the {task.num_train} training samples", recipe.train.batch_size, hint)
        )
    ctx.seed_torch("init")
    module: nn.Module = registry.load("model", recipe.model.name).build(recipe.model, task).to(ctx.device)
    replica = Replica(module)
    codec = registry.load("codec", recipe.codec.name)(recipe.codec, workers=recipe.workers)
    codec.lay(replica.layout)
    mode, reduction = recipe.exchange.mode, recipe.exchange.reduction
    if mode == "auto":
        again = recipe.verb != "sparsify" and not getattr(recipe.method, "error_feedback", False)
        link = Link(recipe.exchange.bandwidth, recipe.exchange.latency)
        mode, reduction = choose(codec, replica.numel, recipe.workers, link, again=again)
    workers = ctx.workers(recipe.workers, reduction)
    exchange = Exchange(workers, codec, ctx.meter, mode)
    per_epoch = task.steps_per_epoch(recipe.workers * recipe.train.batch_size)
    steps = recipe.train.steps or max(1, round(recipe.train.epochs * per_epoch))
    theta = workers.broadcast(replica.read())  # rank 0's weights, whatever the others drew
    setup = Setup(theta, replica.layout, workers, exchange, recipe.optimizer, ctx, steps, recipe)
    method = registry.load("method", recipe.method.name, verb=recipe.verb)(recipe.method, setup)
    buffers = [replica.buffers() for _ in workers.hosted]
    return Job(task, replica, workers, exchange, method, buffers, steps, per_epoch, recipe.train.accumulate)


def run(recipe: Any, ctx: Context, record: Record) -> dict[str, float]:
    """Train, measure, record; returns the final metrics.

    Raises:
        Diverged: a loss or gradient is not finite.
        Stopped: asked to stop; the state is saved.
    """
    job = build(recipe, ctx)
    checkpoints = Checkpoints(record.folder, recipe.checkpoint, ctx, record.note)
    stop = Stop(record.folder, ctx)
    saved = checkpoints.latest()
    if saved is None:
        record.rewind(-1)  # what a run wrote that was killed before its first checkpoint
    first = _restore(job, saved, ctx, record) if saved else _adopt(job, recipe, ctx, record)
    for text in job.method.notes():
        record.note(text)
    every = recipe.eval.every or (max(1, round(recipe.eval.every_epochs * job.steps_per_epoch)) if recipe.eval.every_epochs else None)

    for step in range(first, job.steps):
        if stop.requested(step):
            _save(recipe, checkpoints, job, ctx, step)
            raise Stopped(Issue(str(record.folder), f"stopped after step {step} of {job.steps}", has_value=False))
        lr = recipe.optimizer.lr * factor(recipe.schedule, step, job.steps, job.steps_per_epoch)
        losses, grads = [], []
        for slot, worker in enumerate(job.workers.hosted):
            loss, grad = gradient(recipe, ctx, job, slot, worker, step)
            losses.append(loss)
            grads.append(grad)
        _refuse_non_finite(losses, grads, job.workers.hosted, step)
        job.method.step(grads, lr, step)
        if job.method.exchanges(step):
            _share_buffers(recipe.train.buffers, job, ctx)

        done = step + 1
        record.progress(done, job.steps, loss=losses[0])
        if done % recipe.log.every == 0 or done == job.steps:
            mean = sum(job.workers.objects(losses)) / job.workers.count
            record.log(done, {"batch_loss": mean, "lr": lr, **job.method.diagnostics()}, split="train", **_place(recipe, job, done))
        if every and done % every == 0 and done < job.steps:
            record.log(done, _measure(recipe, job, ctx, job.task.watched), **_place(recipe, job, done))
        if checkpoints.due(done) and done < job.steps:
            _save(recipe, checkpoints, job, ctx, done)

    metrics = _measure(recipe, job, ctx, job.task.measured)
    if first < job.steps or saved is None:
        record.log(job.steps, metrics, **_place(recipe, job, job.steps))
        _save(recipe, checkpoints, job, ctx, job.steps)
    return {**metrics, **_cost(job, ctx)}


def outlined(recipe: Any, ctx: Context) -> tuple[Job, str]:
    """A job to foresee with, and why its data are not there: then the published sizes of the set stand in for them."""
    try:
        return build(recipe, ctx), ""
    except DataError as reason:
        outline = getattr(registry.load("dataset", recipe.data.name), "outline", None)
        if outline is None:
            raise
        return build(recipe, ctx, outline(recipe.data)), f"{reason.issues[0].what}; {reason.issues[0].hint}"


def forecast(recipe: Any, ctx: Context | None = None) -> Forecast:
    """Steps and bits of a recipe in closed form, without running it; equal to the meter's count afterwards.

    Where the data are not prepared, the published sizes of the set stand in for them and the details say so.
    """
    ctx = ctx or Context(recipe.seed)
    job, absent = outlined(recipe, ctx)
    given = _given(recipe, ctx, job)
    first = given.step if given else 0
    before = job.method.planned_bits(first) if first else {}
    parts = {n: (p[0] - before.get(n, (0, 0))[0], p[1] - before.get(n, (0, 0))[1]) for n, p in job.method.planned_bits(job.steps).items()}
    up, down = _buffer_bits(recipe.train.buffers, job)
    if up or down:
        times = sum(job.method.exchanges(step) for step in range(first, job.steps))
        parts["buffers"] = (times * up, times * down)
    total = (sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values()))
    payload = job.exchange.codec.payload_bits(job.replica.numel)
    details = {
        "parameters": job.replica.numel,
        "steps_per_epoch": job.steps_per_epoch,
        "samples": job.steps * recipe.workers * recipe.train.batch_size,
        "bits_per_element": payload / job.replica.numel,
        "exchange": f"{job.exchange.mode}, {job.workers.reduction}",
        "compression_ratio": 32 * job.replica.numel / payload if payload else None,
        "full_precision_bits_up": job.steps * recipe.workers * 32 * job.replica.numel,
        "parts": {name: {"up": p[0], "down": p[1]} for name, p in parts.items()},
        **({"data": absent} if absent else {}),
    }
    return Forecast(job.steps, total[0], total[1], recipe.workers, details)


def _place(recipe: Any, job: Job, done: int) -> dict[str, Any]:
    """Where ``done`` steps are, beside their number: passes over the data, and exchanges where a verb has local steps."""
    tau = getattr(recipe, "local_steps", None)
    return {"epoch": done / job.steps_per_epoch, **({"round": -(-done // tau)} if tau else {})}


def gradient(recipe: Any, ctx: Context, job: Job, slot: int, worker: int, step: int) -> tuple[float, Tensor]:
    """Loss and clipped gradient of one worker at its own point, with its own buffers."""
    replica = job.replica
    replica.point(job.method.point(worker))
    replica.load_buffers(job.buffers[slot])
    replica.zero_grad()
    batch = job.task.draw(step, worker, job.workers.count, recipe.train.batch_size, recipe.seed).to(ctx.device)
    ctx.seed_torch("dropout", step, worker)
    total = 0.0
    for part in batch.chunks(recipe.train.accumulate):
        with _precision(recipe.train.precision, ctx):
            loss = job.task.loss(replica.module(part.inputs), part) / recipe.train.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if replica.num_buffer_elements:
        job.buffers[slot] = replica.buffers()
    grad = replica.grad()
    return total, grad if job.method.clips_itself else clip_norm(grad, recipe.train.clip_norm)


def _precision(precision: str, ctx: Context) -> Any:
    return torch.autocast(ctx.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def _refuse_non_finite(losses: list[float], grads: list[Tensor], hosted: range, step: int) -> None:
    for loss, grad, worker in zip(losses, grads, hosted, strict=True):
        if not bool(torch.isfinite(grad.sum())) and not bool(torch.isfinite(grad).all()) and math.isfinite(loss):
            raise Diverged(
                Issue(f"step {step}, worker {worker}", "the gradient is not finite", has_value=False, hint="lower optimizer.lr, or warm up")
            )
        if not math.isfinite(loss):
            raise Diverged(
                Issue(
                    f"step {step}, worker {worker}", "the loss is not finite", loss, "lower optimizer.lr, set train.clip_norm, or warm up"
                )
            )


def _share_buffers(policy: str, job: Job, ctx: Context) -> None:
    """Batch-norm statistics after a step: the workers' mean, worker 0's, or each worker's own."""
    if policy == "local" or not job.replica.num_buffer_elements:
        return
    ctx.meter.add("buffers", *_buffer_bits(policy, job))
    common = job.workers.mean(job.buffers) if policy == "mean" else job.workers.broadcast(job.buffers[0].clone())
    job.buffers = [common.clone() for _ in job.workers.hosted]


def _buffer_bits(policy: str, job: Job) -> tuple[int, int]:
    """Bits (up, down) of one exchange of buffers: a mean in full precision, or worker 0 to the others (first)."""
    count, bits = job.workers.count, 32 * job.replica.num_buffer_elements
    return {"mean": job.exchange.dense_bits(job.replica.num_buffer_elements), "first": (bits, (count - 1) * bits), "local": (0, 0)}[policy]


def _measure(recipe: Any, job: Job, ctx: Context, splits: tuple[str, ...]) -> dict[str, float]:
    """Metrics at every point that the method deploys; the first point's names carry no suffix."""
    values: dict[str, float] = {}
    job.replica.load_buffers(job.workers.mean(job.buffers))
    for i, (name, theta) in enumerate(job.method.deploy().items()):
        job.replica.point(theta)
        _recalibrate(recipe, job, ctx)
        for split in splits:
            scores = evaluate(job.replica.module, job.task, split, ctx, recipe.eval.batch_size)
            values.update({metric + (f"_{name}" if i else ""): value for metric, value in job.task.named_scores(split, scores).items()})
    return values


def _recalibrate(recipe: Any, job: Job, ctx: Context) -> None:
    """Batch-norm statistics at the module's present parameters: the mean over the run's first batches, where a method asks for it.

    They were gathered where gradients are taken, which is not where the model is measured. All processes see the same batches.
    """
    count = getattr(recipe.method, "recalibrate_bn", 0)
    norms = [m for m in job.replica.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not count or not norms:
        return
    job.replica.module.eval()  # dropout stays off
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    with torch.no_grad():
        for i in range(count):
            step, worker = divmod(i, job.workers.count)
            job.replica.module(job.task.draw(step, worker, job.workers.count, recipe.train.batch_size, recipe.seed).to(ctx.device).inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    job.replica.module.train()


def _cost(job: Job, ctx: Context) -> dict[str, float]:
    """What a message costs: bits per element of the codec's payload, and the ratio to fp32."""
    bits = job.exchange.codec.payload_bits(job.replica.numel) / job.replica.numel
    return {"bits_per_element": bits, **({"compression_ratio": 32 / bits} if bits else {})}


def _save(recipe: Any, checkpoints: Checkpoints, job: Job, ctx: Context, step: int) -> None:
    shared, workers = job.method.state()
    model = next(iter(job.method.deploy().values()))
    job.replica.load_buffers(job.workers.mean(job.buffers), passes=step * job.accumulate)
    job.replica.point(model)
    _recalibrate(recipe, job, ctx)
    states = {w: {**workers.get(w, {}), "buffers": b} for w, b in zip(job.workers.hosted, job.buffers, strict=True)}
    checkpoints.save(
        step,
        shared={"method": shared, "meter": ctx.meter.state(), "codec": job.exchange.codec.state()},
        workers=states,
        model=job.replica.named(model),
    )


def _restore(job: Job, saved: Saved, ctx: Context, record: Record) -> int:
    job.method.load_state(saved.shared["method"], saved.worker)
    job.buffers = [saved.worker(w)["buffers"] for w in job.workers.hosted]
    job.exchange.codec.load_state(saved.shared.get("codec", {}))
    ctx.meter.load_state(saved.shared["meter"])
    record.rewind(saved.step)
    record.note(f"resumed from step {saved.step} of {job.steps}")
    return saved.step


def _given(recipe: Any, ctx: Context, job: Job) -> Saved | None:
    """The checkpoint of another run that the recipe starts from. Raises RecipeError where it does not fit this one."""
    folder = getattr(recipe, "resume_from", None)
    if folder is None:
        return None
    saved = Checkpoints(Path(folder), recipe.checkpoint, ctx).latest(own=False)
    if saved is None:
        raise RecipeError(Issue("resume_from", "has no whole checkpoint", folder, "name a run folder, as `xutrain runs ls` prints them"))
    there = {**saved.shared.get("method", {}), **(saved.worker(saved.workers[0]) if saved.workers else {})}
    shared, workers = job.method.state()
    missing = {*shared, *workers[job.workers.hosted.start]} - set(there) if workers else set(shared) - set(there)
    if missing:
        what, hint = f"holds no {', '.join(sorted(missing))}, which method {recipe.method.name} needs", "go on with the method of that run"
        raise RecipeError(Issue("resume_from", what, folder, hint))
    if there["x"].numel() != job.replica.numel:
        what = f"holds a model of {there['x'].numel()} parameters, this recipe's has {job.replica.numel}"
        raise RecipeError(Issue("resume_from", what, folder))
    if saved.step >= job.steps:
        what = f"is at step {saved.step} already, and this run ends at step {job.steps}"
        raise RecipeError(Issue("resume_from", what, folder, "set train.steps: they count from the start of that run"))
    return saved


def _adopt(job: Job, recipe: Any, ctx: Context, record: Record) -> int:
    """Go on from another run's checkpoint with any number of workers: each gets the mean of what the workers held.

    All per-worker state is linear in what was produced and sent, so the mean residual, and with it the virtual point
    y = x - mean residual, is what it was.
    """
    saved = _given(recipe, ctx, job)
    if saved is None:
        return 0
    mean = _mean_state([saved.worker(w) for w in saved.workers])
    job.method.load_state(saved.shared["method"], lambda worker: {k: v.clone() for k, v in mean.items()})
    job.buffers = [mean["buffers"].clone() for _ in job.workers.hosted]
    job.exchange.codec.load_state(saved.shared.get("codec", {}))
    record.note(
        f"went on from step {saved.step} of {recipe.resume_from}: {job.workers.count} workers took the mean state of {len(saved.workers)}"
    )
    return saved.step


def _mean_state(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name] for s in states]).mean(dim=0) for name in states[0]}
