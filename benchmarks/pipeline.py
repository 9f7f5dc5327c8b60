"""Pipelines on real processes: seconds per batch of DSP, back-propagation and torch's own GPipe and 1F1B, and what stragglers cost.

Usage:
    python benchmarks/pipeline.py [--unit-ms 10] [--batches 60] [--json]     stages padded by sleep to equal nominal times
    python benchmarks/pipeline.py --stragglers [--unit-ms 5] [--batches 150]  the table of random slow-downs, against the time model
    python benchmarks/pipeline.py --unpadded [--json]                        no padding, K = 2, a perceptron of width 1024

Padded stages sleep until a forward has taken 1 unit, a recomputation 1, a backward 2; sleeping processes overlap on any number of
cores, so the schedule is measured and not the machine. GPipe and 1F1B are torch.distributed.pipelining's, with as many
micro-batches as stages. Predictions come from xutrain.methods.pipeline.timing. One run prints everything with its ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XUTRAIN_DEVICE", "cpu")
import torch
import torch.distributed as dist

from xutrain import registry
from xutrain.engine.context import Context
from xutrain.engine.pulse import Pulse
from xutrain.engine.record import Record
from xutrain.loops.pipelined import Pipeline
from xutrain.methods.pipeline.timing import barrier_percent, slowdown_percent, units_per_batch
from xutrain.recipe.delays import Delays
from xutrain.recipe.load import from_dict


def recipe(method: dict[str, Any], stages: int, batches: int, hidden: list[int], batch_size: int, **sections: Any) -> Any:
    """A perceptron on generated images, measured at the end only."""
    mapping = {
        "data": {"name": "synthetic_images", "size": 16, "channels": 1, "samples": 4 * batch_size, "test_samples": 16},
        "model": {"name": "mlp", "hidden": hidden},
        "split": {"by": "parameters"},
        "stages": stages,
        "train": {"steps": batches, "batch_size": batch_size},
        "optimizer": {"lr": 0.01},
        "eval": {"every_epochs": None},
        "log": {"every": 10**6},
        "method": method,
        **sections,
    }
    mapping["runtime"] = {"poll": 10**6, **mapping.get("runtime", {})}
    return from_dict("pipeline", mapping)


def _rank(rank: int, store: str, chosen: Any, folder: str, answer: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(chosen.stages), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(chosen.stages))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=chosen.stages)
    ctx = Context.open(chosen.seed)
    record = Record(Path(folder), ctx.meter, is_main=ctx.is_main)
    with Pulse(Path(folder), rank, chosen.stages, 1) as pulse:
        pipeline = Pipeline(chosen, ctx, record, pulse)
        dist.barrier()
        pipeline.train()
        if rank == chosen.stages - 1:
            answer.send(pipeline.busy_s / pipeline.iterations)
        dist.barrier()
    os._exit(0)


def seconds(chosen: Any, repeats: int) -> list[float]:
    """Seconds per tick (for a pipeline that flushes: per batch) of the last stage, one number a repeat."""
    found = []
    context = multiprocessing.get_context("fork")
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            receiver, sender = context.Pipe(duplex=False)
            ranks = [
                context.Process(target=_rank, args=(r, f"file://{folder}/store", chosen, folder, sender)) for r in range(chosen.stages)
            ]
            for rank in ranks:
                rank.start()
            assert receiver.poll(600), "a rank did not answer"
            found.append(float(receiver.recv()))
            for rank in ranks:
                rank.join(30)
    return found


def dsp(p: list[int], m: list[int]) -> dict[str, Any]:
    return {"name": "dsp", "p": p, "m": m}


def padded(unit_ms: float, batches: int, repeats: int) -> dict[str, Any]:
    """Equal nominal stages: F 1 unit, R 1, B 2."""
    rows = []
    for stages in (2, 3):
        tight = dsp([1] * (stages - 1) + [0], [2 * (stages - 1 - k) for k in range(stages)])
        methods = [
            {"name": "bp"},
            {"name": "gpipe", "micro_batches": stages},
            {"name": "1f1b", "micro_batches": stages, "recompute": True},
            {"name": "1f1b", "micro_batches": stages},
            {"name": "fr"},
            {"name": "pipedream"},
            tight,
        ]
        for method in methods:
            chosen = recipe(method, stages, batches, [32] * 4, 12, runtime={"unit_ms": unit_ms})
            part = registry.load("method", method["name"], verb="pipeline")
            predicted = units_per_batch(part(chosen.method, stages), stages) * unit_ms / 1000
            measured = statistics.median(seconds(chosen, repeats))
            name = method["name"] + (" recomputing" if method.get("recompute") else "")
            rows.append(
                {"stages": stages, "method": name, "predicted_s": predicted, "measured_s": measured, "of_prediction": predicted / measured}
            )
        best = rows[-1]["measured_s"]
        for row in rows[-len(methods) :]:
            row["dsp_is_faster_by"] = row["measured_s"] / best
    return {"what": "padded", "unit_ms": unit_ms, "batches": batches, "rows": rows}


def stragglers(unit_ms: float, batches: int, repeats: int) -> dict[str, Any]:
    """Three stages of 4 units, each slowed by 1 + s in an iteration with probability 1/3."""
    rows = []
    shapes = [([1, 1, 0], [4, 2, 0]), ([2, 2, 0], [6, 3, 0]), ([3, 3, 0], [10, 5, 0])]
    for p, m in shapes:
        plain = None
        for s in (0.0, 0.5, 1.0, 2.0):
            jitter = {"probability": 1 / 3 if s else 0.0, "slowdown": s}
            chosen = recipe(dsp(p, m), 3, batches, [32] * 4, 12, runtime={"unit_ms": unit_ms, "take": "together"}, straggler=jitter)
            measured = statistics.median(seconds(chosen, repeats))
            plain = plain or measured
            model = slowdown_percent(Delays(tuple(p), tuple(m)), 1 / 3, s, iterations=2000) if s else 0.0
            row = {
                "delays": f"{tuple(p)};{tuple(m)}",
                "s": s,
                "measured_ms": 1000 * measured,
                "slower_percent": 100 * (measured / plain - 1),
            }
            rows.append({**row, "model_percent": model, "barrier_percent": barrier_percent(3, 1 / 3, s)})
    return {"what": "stragglers", "unit_ms": unit_ms, "batches": batches, "rows": rows}


def unpadded(batches: int, repeats: int) -> dict[str, Any]:
    """Real work on real cores, K = 2."""
    rows = []
    methods = [{"name": "bp"}, {"name": "gpipe", "micro_batches": 2}, {"name": "1f1b", "micro_batches": 2}, dsp([1, 0], [2, 0])]
    for method in methods:
        chosen = recipe(method, 2, batches, [1024] * 6, 128)
        rows.append({"stages": 2, "method": method["name"], "measured_s": statistics.median(seconds(chosen, repeats))})
    for row in rows:
        row["samples_per_s"] = 128 / row["measured_s"]
        row["dsp_is_faster_by"] = row["measured_s"] / rows[-1]["measured_s"]
    return {"what": "unpadded", "batches": batches, "rows": rows}


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--unit-ms", type=float, default=10)
    words.add_argument("--batches", type=int, default=60)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--stragglers", action="store_true")
    words.add_argument("--unpadded", action="store_true")
    words.add_argument("--json", action="store_true")
    given = words.parse_args()
    if given.stragglers:
        result = stragglers(given.unit_ms, given.batches, given.repeats)
    elif given.unpadded:
        result = unpadded(given.batches, given.repeats)
    else:
        result = padded(given.unit_ms, given.batches, given.repeats)
    load = os.getloadavg()[0]
    result["machine"] = {"cpus": os.cpu_count(), "load": load, "platform": platform.platform(), "torch": torch.__version__}
    if given.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    columns = list(result["rows"][0])
    for row in [dict(zip(columns, columns, strict=True)), *result["rows"]]:
        sys.stdout.write(
            "  ".join(f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")).ljust(16) for c in columns) + "\n"
        )
    sys.stdout.write(f"load of the machine while this ran: {load:.1f} on {os.cpu_count()} cores\n")


if __name__ == "__main__":
    main()
