"""DSM against its baselines on Python's language reference: a grid at seed 0, then three seeds of the best of each.

    python benchmarks/pretrain_study.py --out /tmp/study --processes 2

Every run is `xutrain pretrain --config dsm` with the overrides printed beside it; finished runs are recalled, so the script may be
interrupted. Writes study.json, study.md and study.svg (validation loss against steps and against bytes sent) into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

COMMON = ["train.steps=1200", "eval.every=120", "schedule.warmup_steps=50"]
TAU = ["method.local_steps=6"]


def _sign(eta: float, **more: float) -> list[str]:
    return [*TAU, f"method.eta={eta}", "method.weight_decay=0.1", *(f"method.{k}={v}" for k, v in more.items())]


GRID: dict[str, list[list[str]]] = {
    "dsm": [_sign(eta, beta1=0.3, beta2=0.5) for eta in (1.0, 1.5, 2.0, 3.0)] + [_sign(1.5, beta1=0.6, beta2=0.8)],
    "slowmo": [[*TAU, f"method.beta={b}"] for b in (0.2, 0.4)],
    "local_adamw": [TAU],
    "adamw": [[]],
    "diloco": [[*TAU, f"method.lr={lr}", f"method.momentum={m}"] for lr, m in ((0.7, 0.9), (0.7, 0.5))],
    "signed_slowmo_a": [_sign(1.5, beta=0.5)],
    "signed_lookahead": [_sign(1.5)],
    "global_adamw": [[*TAU, "method.eta=4.0"]],
}
SEEDS = (0, 1, 2)
#: methods that are run with all seeds; the others are shown with one
THREE = ("dsm", "slowmo", "local_adamw", "adamw", "diloco")


def run(job: tuple[str, str, list[str], int]) -> dict[str, Any]:
    """One run of the study."""
    out, method, overrides, seed = job
    from xutrain.launch.plan import plan
    from xutrain.launch.run import launch
    from xutrain.recipe.load import load

    keys = [f"method.name={method}", *overrides, *COMMON]
    result = launch(plan(load("dsm", "pretrain", keys, seed=seed), out=Path(out), verbosity=-1))
    return {
        "method": method,
        "overrides": overrides,
        "seed": seed,
        **{k: result[k] for k in ("run", "status", "metrics", "bits", "wall_s")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(run, [(str(given.out), m, overrides, 0) for m in THREE for overrides in GRID[m]]))
        best = {m: min((r for r in results if r["method"] == m), key=_loss)["overrides"] for m in THREE}
        jobs = [(str(given.out), m, best[m], seed) for seed in SEEDS[1:] for m in THREE]
        jobs += [(str(given.out), m, overrides, 0) for m in GRID if m not in THREE for overrides in GRID[m]]
        for result in pool.map(run, jobs):
            results.append(result)
            best.setdefault(result["method"], result["overrides"])
            write(given.out, results, best)


def write(out: Path, results: list[dict[str, Any]], best: dict[str, list[str]]) -> None:
    """The study as far as it has come."""
    (out / "study.json").write_text(json.dumps({"results": results, "best": best}, indent=1), encoding="utf-8")
    (out / "study.md").write_text(table(results, best), encoding="utf-8")
    figure(results, best, out / "study.svg")


def _loss(result: dict[str, Any]) -> float:
    value = result["metrics"].get("val_loss")
    return float("inf") if value is None else float(value)


def table(results: list[dict[str, Any]], best: dict[str, list[str]]) -> str:
    """Mean and deviation over the seeds, then everything that was tried at seed 0."""
    lines = [
        "| method | val_loss of each seed | mean | std | Mbit sent by a worker | best of the grid |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for method, overrides in best.items():
        mine = [r for r in results if r["method"] == method and r["overrides"] == overrides]
        losses = [_loss(r) for r in mine]
        mbit = mine[0]["bits"]["up"] / 4 / 1e6
        std = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        seeds, mean = ", ".join(f"{v:.3f}" for v in losses), statistics.fmean(losses)
        text = f"| {method} | {seeds} | {mean:.3f} | {std:.3f} | {mbit:.0f} | `{' '.join(overrides)}` |"
        rows.append((statistics.fmean(losses), text))
    lines += [text for _, text in sorted(rows)]
    lines += ["", "| tried at seed 0 | val_loss |", "| --- | --- |"]
    lines += [f"| {r['method']} `{' '.join(r['overrides'])}` | {_loss(r):.3f} |" for r in results if r["seed"] == 0]
    return "\n".join(lines) + "\n"


def figure(results: list[dict[str, Any]], best: dict[str, list[str]], path: Path) -> None:
    """Mean validation loss of the best choice against steps, and against what one worker has sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from xutrain.engine.record import read_metrics

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for method, overrides in best.items():
        curves: dict[int, list[tuple[float, float]]] = {}
        for result in results:
            if result["method"] == method and result["overrides"] == overrides:
                for line in read_metrics(Path(result["run"])):
                    if line["name"] == "val_loss":
                        curves.setdefault(line["step"], []).append((line["value"], line["bits_up"] / 4 / 8e6))
        steps = sorted(curves)
        losses = [statistics.fmean(v for v, _ in curves[s]) for s in steps]
        left.plot(steps, losses, marker=".", label=method)
        right.plot([curves[s][0][1] for s in steps], losses, marker=".", label=method)
    left.set(xlabel="steps (1,024 tokens each over 4 workers)", ylabel="validation loss of x_{t,0}, nats per byte")
    right.set(xlabel="megabytes sent by one worker", xscale="log")
    left.legend(fontsize=7)
    picture.tight_layout()
    picture.savefig(path)


if __name__ == "__main__":
    main()
