"""What asynchrony gains, what TLS costs, and VertiMosaic beside us, on one clock.

    python benchmarks/vertical.py                 all of the following
    python benchmarks/vertical.py straggler       virtual time to a target gap, lock step / asynchronous, one of q parties slower
    python benchmarks/vertical.py sleeping        the same with three real parties over TLS that sleep in every step, by the wall clock
    python benchmarks/vertical.py tls             updates per second of three parties over mutual TLS on loopback, by batch size
    python benchmarks/vertical.py credit          `train --simulate` of the credit demo from start to end, as a user calls it
    python benchmarks/vertical.py vertimosaic     same rows, same mini-batch steps: time, bytes, messages, AUC (benchmarks/peers/make.py)

Pairwise masks are on, full passes and waiting are included; a ratio above 1 means that asynchrony is faster. ``--json FILE`` writes the
result, ``--quick`` makes it short.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import numpy as np
from make import python as peer_python
from results import Ratio, arguments, write

from xutrain.engine.context import Context
from xutrain.loops import vertical
from xutrain.methods.vertical.measure import References, auc
from xutrain.recipe.load import from_dict, load

Row = dict[str, Any]
#: target gap, step size, epochs
TARGETS = {"afsgd": (5e-3, 0.01, 12), "afsvrg": (1e-5, 0.03, 30), "afsaga": (1e-5, 0.03, 40)}
PARTS = ("straggler", "sleeping", "tls", "credit", "vertimosaic")


def time_to_target(method: Row, parties: int, delay: float, lr: float, epochs: int, target: float, **train: Any) -> float:
    """Virtual time at which the gap, looked at every quarter epoch, falls below the target; infinity where it does not."""
    recipe = from_dict(
        "vertical",
        {
            "data": {"name": "breast_cancer", "parties": parties},
            "method": method,
            "labels": "all",
            "train": {"epochs": epochs, "lr": lr, "weight_decay": 0.01, **train},
            "time": {"slow_party": "party1", "delay": delay, "full_pass": 0.0},
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


def straggler(quick: bool) -> tuple[list[Row], list[Ratio]]:
    """Lock step / asynchronous for every method: as published, with rolling snapshots, with compensated steps."""
    rows: list[Row] = []
    delays = (0.0, 2.0) if quick else (0.0, 1.0, 2.0)
    names = ["afsgd"] if quick else list(TARGETS)
    todo: list[tuple[str, int, list[Future[float]], list[Future[float]]]] = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:  # virtual time: no run disturbs another
        for parties in (4,) if quick else (4, 8):
            for name in names:
                target, lr, epochs = TARGETS[name]
                fixed = (lr, epochs, target)
                barrier: Row = {"snapshot": "barrier"} if name == "afsvrg" else {}
                lock = [pool.submit(time_to_target, {"name": name, **barrier}, parties, d, *fixed, mode="sync") for d in delays]
                forms: list[tuple[str, Row, Row]] = [("as published", barrier, {} if barrier else {"budget": "total"})]
                if barrier:
                    forms.append(("rolling snapshots", {}, {"budget": "total"}))
                forms.append(("compensated steps", {}, {"budget": "total", "rates": "compensated"}))
                for label, more, train in forms:
                    free = [pool.submit(time_to_target, {"name": name, **more}, parties, d, *fixed, **train) for d in delays]
                    todo.append((f"{name}, {label}", parties, lock, free))
        for method, parties, lock, free in todo:
            times = [(a.result(), b.result()) for a, b in zip(lock, free, strict=True)]
            ratios = {f"{1 + d:g}x as slow": a / b if b < float("inf") else None for (a, b), d in zip(times, delays, strict=True)}
            rows.append({"table": "virtual time, lock step / asynchronous", "method": method, "parties": parties, **ratios})

    def of(method: str, parties: int, column: str) -> float | None:
        return next((row[column] for row in rows if (row["method"], row["parties"]) == (method, parties)), None)

    found = [Ratio("virtual time: AFSGD, q=4, one party 3x as slow", of("afsgd, as published", 4, "3x as slow"), ">= 1.4")]
    if not quick:
        published = [v for row in rows if row["method"].endswith("published") for k, v in row.items() if k.endswith("slow") and v]
        found += [
            Ratio("virtual time: AFSGD, q=8, one party 2x as slow", of("afsgd, as published", 8, "2x as slow"), ">= 1.4"),
            Ratio("virtual time: slowest published form, any delay", min(published), ">= 0.85"),
            Ratio("virtual time: AFSVRG compensated, q=4, 3x as slow", of("afsvrg, compensated steps", 4, "3x as slow"), ">= 1.5"),
        ]
    return rows, found


def history(folder: Path, party: str) -> list[Row]:
    lines = [json.loads(line) for line in (folder / party / "history.jsonl").read_text().splitlines()]
    return [line for line in lines if "objective" in line]


def sleeping(quick: bool) -> tuple[list[Row], list[Ratio]]:
    """Seconds until the gap is below 1e-2 with AFSGD; the slow party is not the one that measures."""
    from xutrain.launch.parties import simulate

    minimum, target = 0.10241656575570418, 1e-2
    rows: list[Row] = []
    epochs = 2 if quick else 16
    free: Row = {"mode": "async", "budget": "total", "epochs": 2 * epochs}  # quick parties take most of a shared budget
    forms: list[tuple[str, Row]] = [
        ("lock step", {"mode": "sync", "epochs": epochs}),
        ("asynchronous", free),
        ("asynchronous, compensated", {**free, "rates": "compensated"}),
    ]
    for delay in (2.0,) if quick else (0.0, 1.0, 2.0):
        first = None
        for label, train in forms:
            raw = {
                "data": {"name": "breast_cancer"},
                "method": {"name": "afsgd"},
                "labels": "all",
                "train": {"batch_size": 32, "lr": 0.1, "weight_decay": 0.01, **train},
                "time": {"slow_party": "worst", "delay": delay},
                "network": {"step_ms": 5.0 if quick else 25.0},
                "eval": {"every_epochs": 0.5},
            }
            with tempfile.TemporaryDirectory() as folder:
                simulate(from_dict("vertical", raw), Path(folder), lambda text: None)
                lines = history(Path(folder), "mean")
            hit = next((line["seconds"] for line in lines if line["objective"] - minimum < target), None)
            first = hit if label == "lock step" else first
            gain = first / hit if first and hit else None
            rows.append(
                {
                    "table": "sleeping parties over TLS, seconds to a gap of 1e-2",
                    "one party": f"{1 + delay:g}x as slow",
                    "form": label,
                    "seconds": hit,
                    "lock step / this": gain,
                    "last gap": lines[-1]["objective"] - minimum,
                }
            )
    slow = {row["form"]: row["lock step / this"] for row in rows if row["one party"] == "3x as slow"}
    why = "" if slow["asynchronous"] else "the target was not reached"
    return rows, [
        Ratio("sleeping parties: AFSGD, one party 3x as slow", slow["asynchronous"], ">= 1.2", why),
        Ratio("sleeping parties: AFSGD compensated, 3x as slow", slow["asynchronous, compensated"], ""),
    ]


def tls(quick: bool) -> tuple[list[Row], list[Ratio]]:
    """Updates per second of real processes."""
    from xutrain.launch.parties import simulate

    rows: list[Row] = []
    for batch, in_flight, steps in ((64, 4, 60),) if quick else ((1, 1, 400), (64, 1, 400), (64, 4, 800), (256, 4, 400)):
        raw = {
            "data": {"name": "breast_cancer"},
            "method": {"name": "vfb2"},
            "labels": ["mean"],
            "train": {"steps": steps, "batch_size": batch, "lr": 0.01, "weight_decay": 0.01, "in_flight": in_flight},
            "eval": {"every_epochs": max(1e-3, steps * batch / 569 / 4)},
        }
        with tempfile.TemporaryDirectory() as folder:
            simulate(from_dict("vertical", raw), Path(folder), lambda text: None)
            lines = history(Path(folder), "mean")
        first, last = lines[0], lines[-1]
        rate = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
        rows.append(
            {"table": "three parties over mutual TLS", "batch": batch, "in flight": in_flight, "updates/s": rate, "samples/s": rate * batch}
        )
    return rows, [
        Ratio("updates per second over TLS, batch 64, 4 in flight", next(r["updates/s"] for r in rows if r["in flight"] == 4), "")
    ]


def credit(quick: bool) -> tuple[list[Row], list[Ratio]]:
    """Seconds of the command from start to end, three processes over TLS."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        words = ["vertical", "train", "--simulate", "--config", "credit", "--out", folder, "--json"]
        done = subprocess.run([sys.executable, "-m", "xutrain", *words], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
    value = json.loads(done.stdout)
    chosen = {k: v for k, v in value["metrics"].items() if k in ("train_auc", "objective", "wall_s")}
    return [{"table": "credit demo", "seconds": seconds, **chosen}], [
        Ratio("credit demo, three processes over TLS, seconds end to end", seconds, "<= 10")
    ]


def vertimosaic(quick: bool) -> tuple[list[Row], list[Ratio]]:
    """German credit, mini-batch SGD of 64 rows, step 0.2, l2 0.01: VertiMosaic in memory and unmasked, ours in memory and over TLS."""
    inside = peer_python("vertimosaic")
    if inside is None:
        return [], [
            Ratio(
                "VertiMosaic: processor seconds of training / ours", None, "", "no environment: python benchmarks/peers/make.py vertimosaic"
            )
        ]
    from xutrain.launch.parties import simulate

    epochs = 3 if quick else 30
    words = [f"train.epochs={epochs}", "eval.alone=false", "eval.every_epochs=null"]
    recipes = {
        f"{mode}, {name}": load("credit", "vertical", [*words, f"security.mode={mode}", f"method.estimator={name}"]).recipe
        for mode, name in (("plain", "sgd"), ("pairwise", "sgd"), ("pairwise", "svrg"))
    }
    rows: list[Row] = []
    data = vertical.build(recipes["plain, sgd"], Context(0)).data
    names = [p.name for p in data.parties]
    for mode, recipe in recipes.items():
        job = vertical.build(recipe, Context(0))
        began = time.process_time()
        for seat in job.seats:
            seat.begin(job.net)
        while job.net.step():
            pass
        seconds = time.process_time() - began
        found = vertical.measure(recipe, job, References(recipe, job.data))
        sent = job.net.ledger()
        rows.append(_peer_row(f"xutrain, simulation, {mode}", seconds, sent, found))
    with tempfile.TemporaryDirectory() as folder:
        blocks = {f"x_{p.name}": p.train[:, : len(p.columns) - (p.columns[-1] == "intercept")] for p in data.parties}
        options = json.dumps({"lr": 0.2, "epochs": epochs, "weight_decay": 0.01, "batch_size": 64, "seed": 0})
        np.savez(Path(folder) / "data.npz", parties=np.array(names), y=(data.y > 0).astype(float), options=np.array(options), **blocks)
        script = Path(__file__).resolve().parent / "peers" / "run_vertimosaic.py"
        done = subprocess.run([str(inside), str(script), str(Path(folder) / "data.npz")], capture_output=True, text=True, check=True)
        simulate(recipes["pairwise, sgd"], Path(folder) / "tls", lambda text: None)
        last = history(Path(folder) / "tls", names[0])[-1]
        lines = [json.loads(text) for p in names for text in (Path(folder) / "tls" / p / f"ledger.{p}.jsonl").read_text().splitlines()]
    theirs = json.loads(done.stdout.splitlines()[-1])
    z = np.array(theirs["scores"])
    penalty = 0.005 * sum(float(np.square(w).sum()) for w in theirs["weights"].values())
    objective = float(np.logaddexp(0.0, -data.y * z).mean()) + penalty
    row = {"table": "VertiMosaic, German credit", "program": "xutrain, three processes over TLS, pairwise, sgd", "wall s": last["seconds"]}
    row |= {"messages": sum(x["messages"] for x in lines), "bytes": sum(x["bytes"] for x in lines)}
    rows.append({**row, "AUC": last["train_auc"], "objective": last["objective"]})
    row = {
        "table": row["table"],
        "program": f"VertiMosaic {theirs['version']}, in memory, nothing masked",
        "processor s": theirs["seconds"],
    }
    rows.append({**row, "messages": theirs["messages"], "bytes": theirs["bytes"], "AUC": auc(z, data.y), "objective": objective})
    return rows, [
        Ratio(
            "VertiMosaic: processor seconds of training / ours, simulation, nothing masked",
            rows[-1]["processor s"] / rows[0]["processor s"],
            ">= 1",
        ),
        Ratio("VertiMosaic: bytes / ours, nothing masked", rows[-1]["bytes"] / rows[0]["bytes"], ""),
        Ratio("VertiMosaic: AUC minus ours", rows[-1]["AUC"] - rows[0]["AUC"], ""),
    ]


def _peer_row(program: str, seconds: float, ledger: Any, found: Row) -> Row:
    count, bits = sum(ledger.messages.values()), sum(ledger.bits.values())
    row = {"table": "VertiMosaic, German credit", "program": program, "processor s": seconds, "messages": count, "bytes": bits // 8}
    return {**row, "AUC": found["train_auc"], "objective": found["objective"]}


def show(rows: list[Row]) -> None:
    """The tables as text."""
    for table in dict.fromkeys(row["table"] for row in rows):
        chosen = [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == table]
        columns = list(dict.fromkeys(c for row in chosen for c in row))
        wide = {c: max([len(c), *(len(_cell(row.get(c))) for row in chosen)]) for c in columns}
        print(f"\n{table}")
        for row in [dict(zip(columns, columns, strict=True)), *chosen]:
            print("  ".join(_cell(row.get(c)).ljust(wide[c]) for c in columns), flush=True)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if left out")
    arguments(words)
    given = words.parse_args()
    if unknown := set(given.parts) - {*PARTS, "all"}:
        words.error(f"unknown part {', '.join(sorted(unknown))}")
    chosen = [p for p in PARTS if not given.parts or p in given.parts or "all" in given.parts]
    rows: list[Row] = []
    ratios: list[Ratio] = []
    work = {"straggler": straggler, "sleeping": sleeping, "tls": tls, "credit": credit, "vertimosaic": vertimosaic}
    for part in chosen:
        found = work[part](given.quick)
        show(found[0])
        rows, ratios = rows + found[0], ratios + found[1]
    for ratio in ratios:
        print(f"{ratio.name}: {_cell(ratio.value)}  {ratio.aim}  {'' if ratio.met is None else 'met' if ratio.met else 'missed'}")
    write(given.json, "Vertical learning", rows, ratios)


if __name__ == "__main__":
    main()
