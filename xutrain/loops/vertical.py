"""Parties with different features of the same samples: AFSGD/AFSVRG/AFSAGA-VP, their lock-step forms, and all baselines, in one loop.

This is the simulation in virtual time. Real parties run the same seats over gRPC: ``xutrain vertical train``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xutrain.data.tabular import VerticalData
from xutrain.engine.checkpoint import Checkpoints, Saved
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.engine.stop import Stop
from xutrain.engine.workers import Workers
from xutrain.errors import Diverged, Issue, Stopped
from xutrain.launch.plan import Forecast
from xutrain.methods.vertical.base import VerticalMethod
from xutrain.methods.vertical.measure import References, scores
from xutrain.methods.vertical.plan import Plan, computing_times, load_data, methods_of, step_sizes
from xutrain.methods.vertical.seat import Seat
from xutrain.methods.vertical.security import SafeSum
from xutrain.methods.vertical.transports.virtual import VirtualTime


@dataclass
class Job:
    """The parts of a simulation, built from its recipe; the same on every process, but for what ``workers`` hosts."""

    data: VerticalData
    plan: Plan
    safe: SafeSum
    workers: Workers
    methods: dict[int, VerticalMethod]
    seats: list[Seat]
    net: VirtualTime


def build(recipe: Any, ctx: Context) -> Job:
    """Data, plan, seats and network of a recipe."""
    data = load_data(recipe)
    plan = Plan.of(recipe, data)
    safe = safe_sum(recipe, plan)
    workers = ctx.workers(plan.q)
    compute = computing_times(recipe, plan)
    methods = methods_of(recipe, data, plan, list(range(plan.q)), step_sizes(recipe, data, plan, compute))
    seats = [Seat(p, plan, methods[p], data.y if p in plan.active else None, p in workers.hosted) for p in range(plan.q)]
    clock = recipe.time
    net = VirtualTime(
        plan,
        seats,
        safe,
        latency=clock.latency if plan.q > 1 else 0.0,
        compute=compute,
        full_pass=clock.full_pass,
        gather=gathering(workers),
    )
    return Job(data, plan, safe, workers, methods, seats, net)


def safe_sum(recipe: Any, plan: Plan) -> SafeSum:
    """The sums of a recipe, keys and all."""
    security = recipe.security
    return SafeSum(security.mode, plan.q, recipe.seed, security.trees, security.t1, security.t2)


def gathering(workers: Workers) -> Callable[[list[NDArray]], list[NDArray]]:
    """One array of each party on every process, in party order. Ring elements travel as their 64 bits."""

    def gather(arrays: list[NDArray]) -> list[NDArray]:
        if workers.processes == 1:
            return arrays
        kind, shape = arrays[0].dtype, arrays[0].shape
        tensors = [torch.from_numpy(np.ascontiguousarray(a).view(np.int64).reshape(-1)) for a in arrays]
        return [t.numpy().view(kind).reshape(shape) for t in workers.gather(tensors, sizes=[arrays[0].size] * workers.count)]

    return gather


def run(recipe: Any, ctx: Context, record: Record) -> dict[str, float]:
    """Simulate, measure, record; leaves a model file and a ledger per party among the artefacts.

    Raises:
        Diverged: a weight or a total is not finite, or outside the range of the masks.
        Stopped: asked to stop; the state is saved.
    """
    job = build(recipe, ctx)
    plan, net = job.plan, job.net
    references = References(recipe, job.data)
    for text in remarks(recipe, job):
        record.note(text)
    checkpoints = Checkpoints(record.folder, recipe.checkpoint, ctx, record.note)
    stop = Stop(record.folder, ctx)
    saved = checkpoints.latest()
    if saved:
        _restore(job, saved, ctx, record)
    else:
        record.rewind(-1)  # what a run wrote that was killed before its first checkpoint
        for seat in job.seats:
            seat.begin(net)
    first = done = net.steps
    epoch = plan.epoch * len(plan.active)
    every = recipe.eval.every or (max(1, round(recipe.eval.every_epochs * epoch)) if recipe.eval.every_epochs else None)

    while net.step():
        if net.steps == done or net.steps == plan.total_steps:
            continue
        done = net.steps
        if every and done % every == 0:
            net.count(ctx.meter)
            found = measure(recipe, job, references)
            record.log(done, found, epoch=done / epoch)
            record.progress(done, plan.total_steps, objective=found["objective"])
        if stop.requested(done):
            _save(checkpoints, job, ctx, done)
            raise Stopped(Issue(str(record.folder), f"stopped after step {done} of {plan.total_steps}", has_value=False))
        if checkpoints.due(done):
            _save(checkpoints, job, ctx, done)

    net.count(ctx.meter)
    metrics = measure(recipe, job, references)
    if first < plan.total_steps or saved is None:
        record.log(plan.total_steps, metrics, epoch=plan.total_steps / epoch)
        _save(checkpoints, job, ctx, plan.total_steps)
    _leave_artefacts(recipe, job, record)
    return {**metrics, **references.alone, "staleness": float(net.staleness)}


def forecast(recipe: Any) -> Forecast:
    """Steps and bits in closed form; equal to the meter's count afterwards."""
    data = load_data(recipe)
    plan = Plan.of(recipe, data)
    parts = plan.bits(safe_sum(recipe, plan))
    total = sum(parts.values())
    details = {
        "rows": data.n,
        "columns": sum(len(p.columns) for p in data.parties),
        "parties": plan.names,
        "label_holders": [plan.names[p] for p in plan.active],
        "snapshots": plan.snapshots,
        "totals_per_sample": plan.totals_per_sample,
        "parts": {name: {"up": bits, "down": bits} for name, bits in sorted(parts.items()) if bits},
    }
    return Forecast(plan.total_steps, total, total, plan.q, details)


def measure(recipe: Any, job: Job, references: References) -> dict[str, float]:
    """Objective, gap and ranking quality as an observer of all parties sees them. Raises Diverged where they are not finite."""
    hosted = [job.methods[p] for p in job.workers.hosted]
    gather = gathering(job.workers)
    test = [job.methods[p].predict(job.data.parties[p].test) for p in job.workers.hosted]
    norm = sum(float(v[0]) for v in gather([np.array([np.square(m.weights).sum()]) for m in hosted]))
    totals = _sum(gather([m.contribution() for m in hosted]))
    held = _sum(gather(test)) if len(job.data.y_test) else None
    found = scores(job.methods[0], job.data, totals, held, 0.5 * recipe.train.weight_decay * norm, references.minimum)
    if not np.isfinite(found["objective"]):
        raise Diverged(Issue(f"step {job.net.steps}", "the objective is not finite", found["objective"], "lower train.lr"))
    return {**found, "virtual_time": job.net.now}


def _sum(parts: list[NDArray]) -> NDArray:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def remarks(recipe: Any, job: Job) -> list[str]:
    """What a reader of the result must know."""
    plan, data = job.plan, job.data
    said = list(data.notes)
    if data.synthetic:
        said.append(f"SYNTHETIC data in the shape of {data.name.removesuffix('-like')}: these are not results of that data set")
    said += job.safe.statement(plan, recipe.loss, [p.train.shape[1] for p in data.parties])
    said += plan.idle
    if job.safe.stream_name.startswith("Philox"):
        said.append(f"simulated masks from {job.safe.stream_name}; totals are the same to the bit")
    return said


def _leave_artefacts(recipe: Any, job: Job, record: Record) -> None:
    weights = gathering(job.workers)  # blocks differ in width: bring them as padded rows
    widths = [job.methods[p].weights.size for p in range(job.plan.q)]
    padded = [np.pad(job.methods[p].weights.ravel(), (0, max(widths) - widths[p])) for p in job.workers.hosted]
    ledger = job.net.ledger()
    for p, flat in enumerate(weights(padded)):
        party = job.data.parties[p]
        model = {
            "party": party.name,
            "columns": party.columns,
            "weights": flat[: widths[p]].reshape(job.methods[p].weights.shape).tolist(),
            "loss": recipe.loss,
            "method": recipe.method.name,
            "weight_decay": recipe.train.weight_decay,
            "synthetic": job.data.synthetic,
            "preprocessing": party.preprocessing,
        }
        if record.is_main:
            record.artefact(f"model.{party.name}.json").write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
            ledger.write(record.artefact(f"ledger.{party.name}.jsonl"), p, job.plan.names)


def _save(checkpoints: Checkpoints, job: Job, ctx: Context, step: int) -> None:
    job.net.count(ctx.meter)
    workers = {p: _tensors(job.methods[p].state()) for p in job.workers.hosted}
    checkpoints.save(step, shared={"net": _tensors(job.net.state()), "meter": ctx.meter.state()}, workers=workers)


def _restore(job: Job, saved: Saved, ctx: Context, record: Record) -> None:
    job.net.load_state(_arrays(saved.shared["net"]))
    for p in job.workers.hosted:
        job.methods[p].load_state(_arrays(saved.worker(p)))
    ctx.meter.load_state(saved.shared["meter"])
    record.rewind(saved.step)
    record.note(f"resumed from step {saved.step} of {job.plan.total_steps}")


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, dict):
        return {k: _tensors(v) for k, v in value.items()}
    return [_tensors(v) for v in value] if isinstance(value, (list, tuple)) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().copy()
    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    return [_arrays(v) for v in value] if isinstance(value, list) else value
