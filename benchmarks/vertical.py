"""What asynchrony gains and what TLS costs, on one clock: ``python benchmarks/vertical.py [straggler|tls|all]``.

straggler: virtual time to a target gap, lock step divided by asynchronous, one of q parties 1x, 2x, 3x as slow; full passes and waiting
included, pairwise masks on. A ratio above 1 means that asynchrony is faster. Gaps are looked at every quarter epoch.
tls: updates per second of three real processes over mutual TLS on loopback, pairwise masks on, by batch size.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from xutrain.engine.context import Context
from xutrain.loops import vertical
from xutrain.methods.vertical.measure import References
from xutrain.recipe.load import from_dict

TARGETS = {"afsgd": (5e-3, 0.01, 12), "afsvrg": (1e-5, 0.03, 30), "afsaga": (1e-5, 0.03, 40)}
DELAYS = (0.0, 1.0, 2.0)


def time_to_target(method: dict[str, Any], parties: int, delay: float, lr: float, epochs: int, target: float, **train: Any) -> float:
    """Virtual time at which the gap falls below the target; infinity where it does not."""
    recipe = from_dict(
        "vertical",
        {
            "data": {"name": "breast_cancer", "parties": parties},
            "method": method,
            "labels": "all",
            "train": {"epochs": epochs, "lr": lr, "weight_decay": 0.01, **train},
            "time": {"slow_party": "party1" if parties != 3 else "error", "delay": delay},
            "security": {"mode": "pairwise"},
        },
    )
    job = vertical.build(recipe, Context(0))
    references = References(recipe, job.data)
    for seat in job.seats:
        seat.begin(job.net)
    look = job.plan.epoch * len(job.plan.active) // 4
    seen = 0
    while job.net.step():
        if job.net.steps >= seen + look:
            seen = job.net.steps
            if vertical.measure(recipe, job, references)["gap"] < target:
                return job.net.now
    return float("inf")


def straggler() -> None:
    """Print lock step / asynchronous for every method and delay."""
    print(f"{'method':34}{'q':>3}" + "".join(f"   {1 + d:.0f}x as slow" for d in DELAYS))
    for parties in (4, 8):
        for name, (target, lr, epochs) in TARGETS.items():
            barrier: dict[str, Any] = {"snapshot": "barrier"} if name == "afsvrg" else {}
            lock = [time_to_target({"name": name, **barrier}, parties, d, lr, epochs, target, mode="sync") for d in DELAYS]
            forms: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("as published", barrier, {} if barrier else {"budget": "total"})]
            if barrier:
                forms.append(("rolling snapshots", {}, {"budget": "total"}))
            forms.append(("compensated steps", {}, {"budget": "total", "rates": "compensated"}))
            for label, more, train in forms:
                free = [time_to_target({"name": name, **more}, parties, d, lr, epochs, target, **train) for d in DELAYS]
                ratios = "".join(f"{a / b:13.2f}" if b < float("inf") else f"{'-':>13}" for a, b in zip(lock, free, strict=True))
                print(f"{name + ', ' + label:34}{parties:3}{ratios}", flush=True)


def tls() -> None:
    """Print updates per second of real processes."""
    from xutrain.launch.parties import simulate

    print(f"{'batch':>6}{'in flight':>10}{'steps/s':>10}{'samples/s':>11}{'ms/step':>9}")
    for batch, in_flight, steps in ((1, 1, 400), (64, 1, 400), (64, 4, 400), (256, 4, 200)):
        raw = {
            "data": {"name": "breast_cancer"},
            "method": {"name": "vfb2"},
            "labels": ["mean"],
            "train": {"steps": steps, "batch_size": batch, "lr": 0.01, "weight_decay": 0.01, "in_flight": in_flight},
            "eval": {"every_epochs": max(1e-3, steps * batch / 569 / 4)},
        }
        with tempfile.TemporaryDirectory() as folder:
            simulate(from_dict("vertical", raw), Path(folder), lambda text: None)
            lines = [json.loads(line) for line in (Path(folder) / "mean" / "history.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "objective" in line]
        first, last = lines[0], lines[-1]
        rate = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
        print(f"{batch:6}{in_flight:10}{rate:10.0f}{rate * batch:11.0f}{1000 / rate:9.2f}", flush=True)


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    if wanted in ("straggler", "all"):
        straggler()
    if wanted in ("tls", "all"):
        tls()
