"""What is measured of a federated run, and what it leaves beside its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from xutrain.engine.context import Context
from xutrain.engine.evaluate import evaluate
from xutrain.engine.record import Record, write_json
from xutrain.loops.clients import Kept

if TYPE_CHECKING:
    from xutrain.loops.federated import Job


def measure(job: Job, ctx: Context, split: str) -> dict[str, float]:
    """Metrics of what is served: the server's model, or for a personal method the mean over the clients' own models."""
    size = job.bench.eval_batch
    if not job.method.personal:
        job.bench.point(job.method.served(job.server, {}))
        if job.policy != "none":
            job.replica.load_buffers(job.buffers)
        return {f"{split}_{name}": value for name, value in evaluate(job.replica.module, job.task, split, ctx, size).items()}
    alone = Context(ctx.seed, device=ctx.device)
    mine = []
    for client in job.workers.hosted:
        kept = job.kept.get(client) or Kept({}, None)
        job.bench.point(job.method.served(job.server, kept.state))
        if job.policy != "none":
            job.replica.load_buffers(job.buffers if kept.buffers is None else kept.buffers)
        mine.append(evaluate(job.replica.module, job.task, split, alone, size))
    everyone = job.workers.objects(mine)
    return {f"{split}_{name}": sum(m[name] for m in everyone) / len(everyone) for name in everyone[0]}


def over_rounds(seen: list[dict[str, float]]) -> dict[str, float]:
    """Mean and best over the measured rounds of whatever is better when larger."""
    names = [n for n in seen[-1] if n.startswith("test_") and not n.endswith("loss")]
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
