"""What is measured of a federated run, and what it leaves beside its metrics.

A task of labels is measured on what is served; masks of several sites are measured sample by sample in ``site_eval.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.evaluate import evaluate
from xutrain.engine.record import Record, write_json
from xutrain.loops import site_eval
from xutrain.loops.clients import Kept

if TYPE_CHECKING:
    from xutrain.loops.federated import Job

#: parts of metric names that are no progress of the run, so have no mean and best over its rounds
ASIDE = ("_site_", "_with_", "_gamma_", "_selector", "_routed", "_hd95", "loss", "excess")


def measure(job: Job, ctx: Context, split: str) -> dict[str, float]:
    """Metrics of what is served: the server's model, or for a personal method the mean over the clients' own models."""
    size = job.bench.eval_batch
    if site_eval.applies(job):
        return site_eval.measure(job, ctx, split)
    committee = job.method.committee(job.server)
    if not job.method.personal:
        job.bench.point(job.method.served(job.server, {}))
        if job.policy != "none":
            job.replica.load_buffers(job.buffers)
        return {f"{split}_{name}": value for name, value in evaluate(job.replica.module, job.task, split, ctx, size).items()}
    alone = Context(ctx.seed, device=ctx.device)
    mine = []
    for client in job.workers.hosted:
        load(job, client, None if committee is None else committee.own[client])
        mine.append(evaluate(job.replica.module, job.task, split, alone, size))
    everyone = job.workers.objects(mine)
    return {f"{split}_{name}": sum(m[name] for m in everyone) / len(everyone) for name in everyone[0]}


def load(job: Job, client: int, vector: Tensor | None = None) -> None:
    """Point the module at the model that ``client`` uses (a hosted one, unless ``vector`` is given), with its statistics."""
    kept = job.kept.get(client) or Kept({}, None)
    job.bench.point(job.method.served(job.server, kept.state) if vector is None else vector)
    if job.policy != "none":
        job.replica.load_buffers(job.buffers if kept.buffers is None else kept.buffers)


def finish(job: Job, ctx: Context, record: Record) -> dict[str, float]:
    """Measurements of the end of a run that are not made on the way, and their tables and pictures."""
    return site_eval.finish(job, ctx, record) if site_eval.applies(job) else {}


def over_rounds(seen: list[dict[str, float]]) -> dict[str, float]:
    """Mean and best over the measured rounds of whatever is better when larger."""
    names = [n for n in seen[-1] if n.startswith("test_") and not any(part in n for part in ASIDE)]
    return {
        **{f"mean_{n}": sum(s[n] for s in seen) / len(seen) for n in names},
        **{f"best_{n}": max(s[n] for s in seen) for n in names},
    }


def write_partition(record: Record, job: Job) -> None:
    """Which client holds how many samples of which class, as a table beside the run."""
    labels = job.task.labels
    rows = []
    for client, shard in enumerate(job.parts):
        row: dict[str, Any] = {"client": client, "samples": len(shard.train), "val": len(shard.val), "steps": shard.steps}
        if labels is not None:
            row["classes"] = torch.bincount(labels[shard.train], minlength=job.task.num_classes).tolist()
        rows.append(row)
    write_json(record.artefact("partition.json"), {"clients": rows})
