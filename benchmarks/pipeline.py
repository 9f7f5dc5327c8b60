"""Pipelines on real processes: seconds per batch of DSP, its baselines and torch's own GPipe and 1F1B, and what stragglers cost.

    python benchmarks/pipeline.py                  all of the following, as tables
    python benchmarks/pipeline.py padded           stages padded by sleep to equal nominal times, K = 2 and 3
    python benchmarks/pipeline.py unpadded         real work on two cores, K = 2, and the prediction of `xutrain pipeline plan`
    python benchmarks/pipeline.py stragglers       random slow-downs of sleeping ranks, beside the time model

Padded stages sleep until a forward has taken 1 unit, a recomputation 1, a backward 2, reading and updating included; sleeping processes
overlap on any number of cores, so the schedule is measured and not the machine. Only ticks in which every stage works count: filling
and draining are left out. GPipe and 1F1B are torch.distributed.pipelining's, with as many micro-batches as stages. Predictions come from
xutrain.methods.pipeline.timing. ``--json FILE`` writes the result, ``--quick`` makes it short.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XUTRAIN_DEVICE", "cpu")
import numpy as np
import torch
import torch.distributed as dist
from results import Ratio, arguments, write

from xutrain import registry
from xutrain.engine.context import Context
from xutrain.engine.pace import slowed
from xutrain.engine.pulse import Pulse
from xutrain.engine.record import Record
from xutrain.loops.pipelined import Pipeline
from xutrain.methods.pipeline.timing import barrier_percent, simulate, slowdown_percent, units_per_batch
from xutrain.recipe.delays import Delays
from xutrain.recipe.load import from_dict

Row = dict[str, Any]
RECOMPUTES = "DSP recomputes its forward (4 units a batch), 1F1B here keeps its activations (3 units): the time model allows no more"


def recipe(method: Row, stages: int, batches: int, hidden: list[int], batch_size: int, **sections: Any) -> Any:
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


class Clocked(Pipeline):
    """A pipeline that notes when each of its ticks ended."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ends: list[float] = []

    def _tick(self, n: int) -> None:
        super()._tick(n)
        self.ends.append(time.perf_counter())

    def steady_s(self) -> float:
        """Seconds per batch while every stage forwards one batch and goes backward on another."""
        first, last = self.delays.answers[0] + 2, self.job.steps - 1
        return (self.ends[last] - self.ends[first - 1]) / (last - first + 1)


def _rank(rank: int, store: str, chosen: Any, folder: str, answer: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(chosen.stages), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(chosen.stages))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=chosen.stages)
    ctx = Context.open(chosen.seed)
    record = Record(Path(folder), ctx.meter, is_main=ctx.is_main)
    with Pulse(Path(folder), rank, chosen.stages, 1) as pulse:
        pipeline = Clocked(chosen, ctx, record, pulse)
        dist.barrier()
        pipeline.train()
        if rank == chosen.stages - 1:
            answer.send(pipeline.steady_s())
        dist.barrier()
    os._exit(0)


def seconds(chosen: Any, repeats: int) -> float:
    """Median over ``repeats`` of the last stage's steady seconds per batch, one process a stage."""
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
    return statistics.median(found)


def dsp(p: list[int], m: list[int]) -> Row:
    return {"name": "dsp", "p": p, "m": m}


def label(method: Row) -> str:
    if method["name"] == "dsp":
        return f"DSP({','.join(map(str, method['p']))};{','.join(map(str, method['m']))})"
    return str(method["name"]) + (", recomputing" if method.get("recompute") else "")


def padded(unit_ms: float, batches: int, repeats: int) -> tuple[list[Row], list[Ratio]]:
    """Equal nominal stages: F 1 unit, R 1, B 2."""
    rows, ratios = [], []
    for stages in (2, 3):
        methods: list[Row] = [
            {"name": "bp"},
            {"name": "gpipe", "micro_batches": stages},
            {"name": "1f1b", "micro_batches": stages, "recompute": True},
            {"name": "1f1b", "micro_batches": stages},
            {"name": "ddg"},
            {"name": "fr"},
            {"name": "pipedream"},
            dsp([1] * (stages - 1) + [0], [2 * (stages - 1 - k) for k in range(stages)]),
        ]
        found, predicted = {}, {}
        for method in methods:
            name = label(method)
            chosen = recipe(method, stages, batches, [32] * 4, 12, runtime={"unit_ms": unit_ms})
            part = registry.load("method", method["name"], verb="pipeline")
            predicted[name] = units_per_batch(part(chosen.method, stages), stages) * unit_ms / 1000
            found[name] = seconds(chosen, repeats)
        ours = label(methods[-1])
        rows += [
            {
                "table": "padded stages",
                "stages": stages,
                "method": name,
                "predicted ms": 1000 * predicted[name],
                "measured ms": 1000 * measured,
                "of the law": predicted[name] / measured,
                "samples/s": 12 / measured,
                "DSP is faster by": measured / found[ours],
                "law allows": predicted[name] / predicted[ours],
            }
            for name, measured in found.items()
        ]
        ratios.append(Ratio(f"DSP of its law, K={stages}", predicted[ours] / found[ours], ">= 0.95"))
        ratios.append(Ratio(f"DSP over 1F1B that recomputes, K={stages}", found["1f1b, recomputing"] / found[ours], ">= 1.5"))
        ratios.append(Ratio(f"DSP over 1F1B, K={stages}", found["1f1b"] / found[ours], ">= 1.5", RECOMPUTES))
        ratios.append(Ratio(f"DSP over back-propagation, K={stages}", found["bp"] / found[ours], ""))
    return rows, ratios


def stragglers(unit_ms: float, batches: int, repeats: int, slow: tuple[float, ...]) -> tuple[list[Row], list[Ratio]]:
    """Three stages of 4 units, each slowed by 1 + s in an iteration with probability 1/3: sleeping ranks, and the time model twice, with
    the very slow-downs that the ranks had and in the mean of long runs."""
    rows: list[Row] = []
    shapes = [([1, 1, 0], [4, 2, 0]), ([2, 2, 0], [6, 3, 0]), ([3, 3, 0], [10, 5, 0]), ([10, 10, 0], [40, 20, 0])]
    for p, m in shapes:
        delays = Delays(tuple(p), tuple(m))
        plain = seconds(_slowed(p, m, unit_ms, batches, 0.0), repeats)
        for s in slow:
            chosen = _slowed(p, m, unit_ms, batches, s)
            measured = seconds(chosen, repeats)
            longer = np.array([[slowed(chosen.straggler, k, n) for n in range(batches + m[0])] for k in range(3)])
            same = _steady(delays, longer, batches) / _steady(delays, np.ones_like(longer), batches)
            rows.append(
                {
                    "table": "stragglers",
                    "delays": f"m={','.join(map(str, m))}",
                    "s": f"{100 * s:.0f}%",
                    "measured ms": 1000 * measured,
                    "measured %": 100 * (measured / plain - 1),
                    "added, % of a nominal batch": 100 * (measured - plain) / (4 * unit_ms / 1000),
                    "model, same draw %": 100 * (same - 1),
                    "model, long run %": slowdown_percent(delays, 1 / 3, s, iterations=4000),
                    "barrier %": barrier_percent(3, 1 / 3, s),
                    "limit %": 100 * s / 3,
                }
            )
    # what a batch costs beside its nominal time (messages) is in every row, so the time that a straggler adds is compared, not the quotient
    worst = max(abs(row["added, % of a nominal batch"] - row["model, same draw %"]) for row in rows)
    return rows, [Ratio("stragglers: largest distance of the time they add from the model's, % of a nominal batch", worst, "<= 5")]


def _slowed(p: list[int], m: list[int], unit_ms: float, batches: int, s: float) -> Any:
    jitter = {"probability": 1 / 3 if s else 0.0, "slowdown": s}
    return recipe(dsp(p, m), 3, batches, [32] * 4, 12, runtime={"unit_ms": unit_ms, "take": "together"}, straggler=jitter)


def _steady(delays: Delays, longer: np.ndarray, batches: int) -> float:
    """The model's seconds per batch of the last stage over the ticks that ``Clocked.steady_s`` counts; its ticks lag by P."""
    return simulate(delays, [1.0] * 3, 0.0, batches, longer, since=delays.answers[0] + 2)


def unpadded(batches: int, repeats: int, width: int) -> tuple[list[Row], list[Ratio]]:
    """Real work on real cores, K = 2, and what the planner said of it."""
    from xutrain.loops.pipeline_plan import plan

    rows: list[Row] = []
    methods: list[Row] = [
        {"name": "bp"},
        {"name": "gpipe", "micro_batches": 2},
        {"name": "1f1b", "micro_batches": 2, "recompute": True},
        {"name": "1f1b", "micro_batches": 2},
        {"name": "pipedream"},
        dsp([1, 0], [2, 0]),
    ]
    found = {label(m): seconds(recipe(m, 2, batches, [width] * 6, 128), repeats) for m in methods}
    ours = label(methods[-1])
    torch.set_num_threads(1)
    said = plan(recipe(methods[-1], 2, batches, [width] * 6, 128), processes=2, cores=len(os.sched_getaffinity(0)))["recipe"]
    for name, measured in found.items():
        rows.append(
            {
                "table": "no padding, K=2",
                "method": name,
                "measured ms": 1000 * measured,
                "samples/s": 128 / measured,
                "DSP is faster by": measured / found[ours],
            }
        )
    rows[-1]["planned ms"] = 1000 * said.seconds
    return rows, [
        Ratio("no padding, K=2: DSP over back-propagation", found["bp"] / found[ours], ""),
        Ratio("no padding, K=2: DSP over 1F1B that recomputes", found["1f1b, recomputing"] / found[ours], ""),
        Ratio("no padding, K=2: DSP over 1F1B", found["1f1b"] / found[ours], ""),
        Ratio("no padding, K=2: planned over measured seconds per batch", said.seconds / found[ours], ""),
    ]


def show(rows: list[Row]) -> None:
    """The tables as text."""
    for table in dict.fromkeys(row["table"] for row in rows):
        chosen = [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == table]
        columns = list(dict.fromkeys(c for row in chosen for c in row))
        sys.stdout.write(f"\n{table}\n" + "".join(f"{c:>20}" for c in columns) + "\n")
        for row in chosen:
            cells = [row.get(c, "") for c in columns]
            sys.stdout.write("".join(f"{c:20.4g}" if isinstance(c, float) else f"{c!s:>20}" for c in cells) + "\n")


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("parts", nargs="*", metavar="PART", help="padded, unpadded, stragglers; all if left out")
    words.add_argument("--unit-ms", type=float, default=20.0, help="padded: milliseconds of a unit; a DSP batch has 4")
    words.add_argument("--batches", type=int, default=40)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--stragglers", action="store_true", help="the part of that name")
    words.add_argument("--unpadded", action="store_true", help="the part of that name")
    arguments(words)
    given = words.parse_args()
    named = [*given.parts, *(n for n in ("stragglers", "unpadded") if getattr(given, n))]
    if unknown := set(named) - {"padded", "unpadded", "stragglers"}:
        words.error(f"unknown part {', '.join(sorted(unknown))}")
    parts = named or ["padded", "unpadded", "stragglers"]
    batches, repeats = (14, 1) if given.quick else (given.batches, given.repeats)
    rows: list[Row] = []
    ratios: list[Ratio] = []
    if "padded" in parts:
        found = padded(5.0 if given.quick else given.unit_ms, batches, repeats)
        rows, ratios = rows + found[0], ratios + found[1]
    if "unpadded" in parts:
        found = unpadded(batches, repeats, 128 if given.quick else 1024)
        rows, ratios = rows + found[0], ratios + found[1]
    if "stragglers" in parts:
        found = stragglers(1.0 if given.quick else 5.0, 60 if given.quick else 150, 1, (1.0,) if given.quick else (0.2, 0.5, 1.0, 1.5, 2.0))
        rows, ratios = rows + found[0], ratios + found[1]
    show(rows)
    for ratio in ratios:
        sys.stdout.write(f"{ratio.name}: {ratio.value:.3g}  {ratio.aim}  {'' if ratio.met is None else 'met' if ratio.met else 'missed'}\n")
    sys.stdout.write(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    write(given.json, "Pipelines", rows, ratios)


if __name__ == "__main__":
    main()
