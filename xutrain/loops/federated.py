"""Rounds of clients: DOMO, FedSM, Auto-FedRL, every baseline, in one loop. See ``methods/federate/base.py`` for what a method answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xutrain import registry
from xutrain.data.base import Task
from xutrain.data.partition import Samples, deal
from xutrain.engine.checkpoint import Checkpoints, Saved
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.engine.replica import Replica
from xutrain.engine.rng import Key
from xutrain.engine.schedule import factor
from xutrain.engine.stop import Stop
from xutrain.engine.workers import Workers
from xutrain.errors import Issue, Stopped
from xutrain.launch.plan import Forecast
from xutrain.loops import site_eval
from xutrain.loops.absence import count_lost, lose, lost_numbers
from xutrain.loops.clients import Bench, ClientData, Kept, Shard, shards
from xutrain.loops.federated_checks import check_combination
from xutrain.loops.federated_eval import finish, measure, over_rounds, write_partition
from xutrain.loops.federated_search import check_validation, draw_search, searched
from xutrain.loops.networks import Extra, build_networks, describe
from xutrain.loops.uplink import BUFFERS, Sent, Uplink
from xutrain.methods.federate.base import SINCE, UNDO, FederatedMethod, Federation, Plan, Reply, Round, State, finite


@dataclass
class Job:
    """The parts of a run, built from its recipe; the mutable half is what a checkpoint holds.

    Attributes:
        server: the method's server state, equal on every process.
        kept: what the hosted clients keep.
        taken: local steps that each client has done so far, all clients.
        eval: the recipe's section on measuring.
        initial: batch-norm statistics before round 0, with which a client begins that keeps its own.
        extras: further networks that the method wants.
        seen: round and metrics of every measurement so far.
    """

    task: Task
    replica: Replica
    bench: Bench
    workers: Workers
    uplink: Uplink
    method: FederatedMethod
    parts: list[Shard]
    policy: str
    server: State
    taken: list[int]
    eval: Any
    initial: Tensor
    extras: dict[str, Extra] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    seen: list[dict[str, float]] = field(default_factory=list)

    @property
    def buffers(self) -> Tensor:
        """The server's batch-norm statistics, part of its state: who takes a model back takes them back as well."""
        statistics: Tensor = self.server[BUFFERS]
        return statistics


def samples_of(task: Task) -> Samples:
    """What a partition may know of a task."""
    labels = None if task.labels is None else task.labels.numpy()
    return Samples(task.num_train, labels, None if task.sites is None else task.sites.numpy())


def build(recipe: Any, ctx: Context) -> Job:
    """Data, partition, model, codec and method of a recipe, equal on every process."""
    task: Task = registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    site_eval.check(task, recipe.eval.sites)
    clients: int = recipe.clients.count
    cls = registry.load("method", recipe.method.name, verb="federate")
    rule = registry.load("partition", recipe.partition.name)
    dealt = deal(rule, recipe.partition, samples_of(task), clients, task.num_classes, Key(recipe.seed, "partition").numpy())
    aside, cases = getattr(task, "held_out", None), getattr(task, "train_cases", None)
    parts = shards(dealt, recipe.clients, recipe.train, recipe.seed, pooled=cls.pooled, aside=aside, cases=cases)
    ctx.seed_torch("init")
    module: nn.Module = registry.load("model", recipe.model.name).build(recipe.model, task).to(ctx.device)
    module.train()
    replica = Replica(module)
    workers = ctx.workers(clients)
    codec = registry.load("codec", recipe.codec.name)(recipe.codec, workers=recipe.per_round)
    codec.lay(replica.layout)
    check_combination(recipe, cls, codec, replica.num_buffer_elements)
    extras = build_networks(cls.networks(recipe.method, clients), task, ctx)
    federation = Federation(
        clients,
        _weights(recipe, dealt),
        recipe.per_round < clients or recipe.clients.dropout > 0,
        recipe.seed,
        tuple((s.name, s.start, s.stop) for s in replica.layout),
        tuple(s.shape for s in replica.layout),
        replica.num_buffer_elements,
        recipe.train.rounds,
        {name: workers.broadcast(extra.replica.read()) for name, extra in extras.items()},
        recipe.train.optimizer,
        recipe.train.reset_optimizer,
    )
    method: FederatedMethod = cls(recipe.method, federation)
    bench = Bench(task, replica, ctx, recipe.train, recipe.eval.batch_size)
    if cls.validates:
        check_validation(recipe, parts, f"{recipe.method.name} learns from them")
    if recipe.search is not None:
        method = searched(recipe, method, bench, parts)
    theta = workers.broadcast(replica.read())  # rank 0's weights, whatever the others drew
    buffers = workers.broadcast(replica.buffers()) if replica.num_buffer_elements else replica.buffers()
    uplink = Uplink(ctx, workers, codec, recipe.uplink.error_feedback, silent=cls.silent)
    private = cls.silent or cls.private_buffers
    policy = "none" if not replica.num_buffer_elements else "local" if private else recipe.train.buffers
    return Job(
        task,
        replica,
        bench,
        workers,
        uplink,
        method,
        parts,
        policy,
        {**method.server_state(theta), BUFFERS: buffers},
        [0] * clients,
        recipe.eval,
        buffers,
        extras,
    )


def _weights(recipe: Any, dealt: list[Any]) -> tuple[float, ...]:
    """p_k of every client."""
    if recipe.clients.weights == "equal":
        return (1 / len(dealt),) * len(dealt)
    total = sum(len(part) for part in dealt)
    return tuple(len(part) / total for part in dealt)


def plan_round(recipe: Any, job: Job, index: int) -> Round:
    """Who takes part in a round, with which weights and learning rate, before the method has its say."""
    clients: int = recipe.clients.count
    chosen: tuple[int, ...] = (0,) if job.method.pooled else tuple(range(clients))
    if not job.method.pooled and recipe.per_round < clients:
        order = torch.randperm(clients, generator=Key(recipe.seed, "clients", index).generator())
        chosen = tuple(sorted(order[: recipe.per_round].tolist()))
    gone = () if job.method.silent else lose(recipe, chosen, index)
    chosen = tuple(k for k in chosen if k not in gone)
    weights = [job.method.federation.weights[k] for k in chosen]
    if len(chosen) < clients:
        weights = [w / sum(weights) for w in weights]
    passes = job.parts[0].steps / job.parts[0].per_pass  # passes of a round: what an epoch is for the schedule
    lr = recipe.train.lr * factor(recipe.schedule, index, recipe.train.rounds, max(1, round(1 / passes)))
    return Round(index, lr, chosen, tuple(job.parts[k].steps for k in chosen), tuple(weights), lost=gone)


def run(recipe: Any, ctx: Context, record: Record) -> dict[str, float]:
    """Train, measure, record; returns the final metrics.

    Raises:
        RecipeError: a partition or a combination that cannot be trained, before the first round.
        Diverged: a client's answer is not finite.
        Stopped: asked to stop; the state is saved.
    """
    job = build(recipe, ctx)
    checkpoints = Checkpoints(record.folder, recipe.checkpoint, ctx, record.note)
    stop = Stop(record.folder, ctx)
    saved = checkpoints.latest()
    if saved is None:
        record.rewind(-1)  # what a run wrote that was killed before its first checkpoint
    first = _restore(job, saved, ctx, record) if saved else 0
    rounds: int = recipe.train.rounds
    if first == 0 and ctx.is_main:
        write_partition(record, job)
    for remark in job.method.notes():
        record.note(remark)

    for index in range(first, rounds):
        if stop.requested(index):
            _save(checkpoints, job, ctx, index)
            raise Stopped(Issue(str(record.folder), f"stopped after round {index} of {rounds}", has_value=False))
        setting = job.method.configure(job.server, plan_round(recipe, job, index))
        lost = job.method.lost(job.server)
        measured = play(job, setting)

        done = index + 1
        if job.method.lost(job.server) > lost:
            record.note(f"round {done}: not finite; reward -1, the model before it came back")
        record.progress(done, rounds, unit="round", loss=measured.get("local_loss", float("nan")))
        if done % recipe.log.every == 0 or done == rounds:
            record.log(done, measured, split="train", round=done)
        searched = job.method.report(job.server)
        if searched:
            record.log(done, searched, split="search", round=done)
        if done % recipe.eval.every == 0 or done == rounds:
            job.seen.append({"round": done, **measure(job, ctx, "test")})
            record.log(done, {k: v for k, v in job.seen[-1].items() if k != "round"}, round=done)
        if checkpoints.due(done) and done < rounds:
            _save(checkpoints, job, ctx, done)

    final = {**measure(job, ctx, "train"), **{k: v for k, v in job.seen[-1].items() if k != "round"}}
    if first < rounds or saved is None:
        record.log(rounds, {k: v for k, v in final.items() if k.startswith("train")}, round=rounds)
        _save(checkpoints, job, ctx, rounds)
    if recipe.search is not None and ctx.is_main:
        draw_search(record)
    return {**final, **over_rounds(job.seen), **finish(job, ctx, record)}


def play(job: Job, setting: Round) -> dict[str, float]:
    """One round: every exchange of every client in ``setting``, merged in the order of clients. Returns measures of the round."""
    gathered: dict[str, float] = {"clients_lost": float(len(setting.lost))} if setting.lost else {}
    sent = job.buffers.numel() if job.policy == "mean" else 0
    count_lost(job.method, job.server, setting, job.uplink, job.workers.hosted, sent)
    for exchange in range(job.method.exchanges):
        setting = job.method.refine(job.server, setting, exchange)
        last = exchange == job.method.exchanges - 1
        merged = _Merged(job, setting, exchange, last)
        job.method.merge(job.server, setting, merged.replies(), exchange)
        gathered.update(merged.finish())
    for client, steps in zip(setting.clients, merged.steps, strict=True):
        job.taken[client] += steps
    job.uplink.settle()
    return {**gathered, "lr": setting.lr}


class _Merged:
    """The replies of one exchange on their way to ``merge``; what travels beside the method's own vectors is taken out here."""

    def __init__(self, job: Job, setting: Round, exchange: int, last: bool) -> None:
        self.job, self.setting, self.exchange, self.last = job, setting, exchange, last
        self.buffers = torch.zeros_like(job.buffers)
        self.measures: dict[str, float] = {}
        self.steps: list[int] = []

    def replies(self) -> Iterator[Reply]:
        weights = dict(zip(self.setting.clients, self.setting.weights, strict=True))
        for reply, loss in self.job.uplink.stream(self.setting.clients, self.work):
            reply.weight = weights[reply.client]
            buffers = reply.tensors.pop(BUFFERS, None)
            if buffers is not None:
                self.buffers.add_(buffers, alpha=reply.weight)
            self.steps.append(int(reply.measures.pop("steps")))
            if self.last and self.job.policy != "none" and len(self.steps) == len(self.setting.clients):
                self.job.server[BUFFERS] = self.buffers  # everybody has answered; the method may still take them back
            for name, value in {**reply.measures, "local_loss": loss}.items():
                self.measures[name] = self.measures.get(name, 0.0) + reply.weight * value
            yield reply

    def work(self, client: int) -> Sent:
        """One client's exchange, on the process that hosts it."""
        job, setting = self.job, self.setting
        ctx = job.bench.ctx
        kept = job.kept.get(client)
        if kept is None:
            kept = Kept(job.method.client_state(client))
        plan = job.method.plan(job.server, setting, client, self.exchange).copy()
        job.uplink.count_plan(plan)
        kept = self.recall(kept, plan)
        problem = ClientData(job.bench, client, job.parts[client], job.taken[client], extras=job.extras)
        if job.policy != "none":
            own = job.initial if kept.buffers is None else kept.buffers
            start = own if job.policy == "local" else job.buffers
            job.replica.load_buffers(start)
            if job.policy == "mean" and self.exchange == 0:
                job.uplink.count_buffers(start.numel())
        ctx.seed_torch(f"local/{self.exchange}", setting.index, client)
        reply = job.method.step(kept.state, plan, problem)
        reply.client = client
        reply.measures["steps"] = plan.steps
        if self.last and job.policy != "none":
            end = job.replica.buffers()
            reply.tensors[BUFFERS] = end
            if job.policy == "local":
                kept.buffers = end
        tolerant, counted = job.method.tolerant, job.policy == "mean"
        broken = tolerant and not finite(reply.tensors)  # leaves no trace at its client
        sent = job.uplink.send(reply, kept, setting.index, self.exchange, problem.mean_loss, tolerant=tolerant, count_buffers=counted)
        if broken and self.last:
            kept.undo(setting.index)
        job.kept[client] = kept
        if kept.empty:
            del job.kept[client]
        return sent

    def recall(self, kept: Kept, plan: Plan) -> Kept:
        """What the client starts from: ``kept``, without the rounds that the server threw away, or nothing of an earlier training."""
        undo, since = plan.numbers.pop(UNDO, None), plan.knobs.pop(SINCE, 0)
        if undo is not None:
            kept.undo(int(undo))
        if kept.past and kept.past[-1][0] < since:
            kept = Kept(self.job.method.client_state(plan.client))
        if self.job.method.tolerant:
            kept.remember(self.setting.index)
        return kept

    def finish(self) -> dict[str, float]:
        """The weighted means of what the clients measured."""
        assert len(self.steps) == len(self.setting.clients), "a method must use up its stream of replies"
        return {name: value for name, value in self.measures.items() if value == value}


def forecast(recipe: Any) -> Forecast:
    """Rounds and bits of a recipe in closed form, without running it; equal to the meter's count afterwards."""
    job = build(recipe, Context(recipe.seed))
    rounds, numel = recipe.train.rounds, job.replica.numel
    parts: dict[str, list[int]] = {}
    previous: float | None = None
    for index in range(rounds if not job.method.silent else 0):
        setting = plan_round(recipe, job, index)
        count = len(setting.clients)
        traffic = job.method.traffic_in(setting, numel, previous)
        for name, numbers in traffic.down.items():
            parts.setdefault(name, [0, 0])[1] += count * 32 * numbers
        sent = job.buffers.numel() if job.policy == "mean" else 0
        for name, numbers in lost_numbers(job.method, job.server, setting, traffic.down, sent).items():
            parts.setdefault(name, [0, 0])[1] += 32 * numbers
        for name, numbers in traffic.up.items():
            bits = 32 * numbers if job.uplink.dense else job.uplink.codec.payload_bits(numbers)
            parts.setdefault(name, [0, 0])[0] += count * bits
        for name, numbers in traffic.answers.items():
            parts.setdefault(name, [0, 0])[0] += count * 32 * numbers
        if job.policy == "mean":
            buffers = parts.setdefault(BUFFERS, [0, 0])
            buffers[0] += count * 32 * job.buffers.numel()
            buffers[1] += count * 32 * job.buffers.numel()
        previous = setting.lr
    steps = [s.steps for s in job.parts]
    details = {
        "parameters": numel,
        "buffers": job.buffers.numel(),
        **describe(job.extras),
        "clients_per_round": 1 if job.method.pooled else recipe.per_round,
        "local_steps": {"min": min(steps), "max": max(steps)},
        "samples_per_client": {"min": min(len(s.train) for s in job.parts), "max": max(len(s.train) for s in job.parts)},
        "parts": {name: {"up": up, "down": down} for name, (up, down) in sorted(parts.items())},
    }
    return Forecast(rounds, sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values()), recipe.participants, details)


def _save(checkpoints: Checkpoints, job: Job, ctx: Context, index: int) -> None:
    shared = {"server": job.server, "taken": job.taken, "meter": ctx.meter.state(), "seen": job.seen}
    if job.policy != "none":
        job.replica.load_buffers(job.buffers)
    workers = {client: kept.pack() for client, kept in job.kept.items()}
    checkpoints.save(index, shared=shared, workers=workers, model=job.replica.named(job.method.served(job.server, {})))


def _restore(job: Job, saved: Saved, ctx: Context, record: Record) -> int:
    shared = saved.shared
    job.server, job.taken, job.seen = shared["server"], list(shared["taken"]), list(shared["seen"])
    job.kept = {client: Kept.unpack(saved.worker(client)) for client in saved.workers if client in job.workers.hosted}
    ctx.meter.load_state(shared["meter"])
    record.rewind(saved.step)
    record.note(f"resumed from round {saved.step}")
    return saved.step
