"""What the study of DSM and its baselines says: losses, rounds and bytes to a loss, and the figure with four axes.

    python benchmarks/pretrain_study.py [--out runs] [--targets 2.5 2.3] [--json FILE] [--quick]

Runs what is missing of the suite ``dsm_pydoc`` (`xutrain sweep`, finished runs are recalled; half an hour on two idle cores) and reads
its run folders; ``--read`` runs nothing. Bytes are those that one worker sends. Writes study.md and study.svg into --out.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import Ratio, arguments, write

from xutrain.engine.record import read_json, read_metrics
from xutrain.report.suite import open_table

SUITE, METRIC = "dsm_pydoc", "val_loss"
AXES = {"steps": "steps", "tokens": "tokens, millions", "rounds": "exchanges", "bytes": "megabytes sent by one worker"}


@dataclass(frozen=True)
class Curve:
    """Validation loss of one run and where it was measured, one list an axis."""

    loss: list[float]
    at: dict[str, list[float]]

    def reach(self, target: float, axis: str) -> float | None:
        """Where the loss first falls to ``target``, by a straight line between two measurements; None where it never does."""
        at = self.at[axis]
        if self.loss[0] <= target:
            return at[0]
        for (y0, x0), (y1, x1) in pairwise(zip(self.loss, at, strict=True)):
            if y1 <= target < y0:
                return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
        return None


def read(folder: Path) -> Curve | None:
    """The curve of a finished run."""
    if read_json(folder / "state.json").get("status") != "done":
        return None
    from xutrain.recipe.load import load

    recipe = load(str(folder / "recipe.yaml"), None, []).recipe
    lines = [line for line in read_metrics(folder) if line["name"] == METRIC]
    tokens = recipe.workers * recipe.train.batch_size * recipe.data.context
    at = {
        "steps": [float(line["step"]) for line in lines],
        "tokens": [line["step"] * tokens / 1e6 for line in lines],
        "rounds": [float(-(-line["step"] // recipe.local_steps)) for line in lines],
        "bytes": [line["bits_up"] / recipe.workers / 8e6 for line in lines],
    }
    return Curve([float(line["value"]) for line in lines], at)


def study(out: Path, smoke: bool) -> dict[str, list[Curve]]:
    """Label of a row -> the curves of its seeds, best first."""
    table = open_table(SUITE, smoke=smoke)
    cells = read_json(out / "suites" / table.manifest).get("cells", {})
    found: dict[str, list[Curve]] = {}
    for cell in table.cells:
        known = cells.get(cell.key, {})
        curves = [read(out / known["folder"] / f"seed{seed}") for seed in known.get("seeds", [])]
        kept = [c for c in curves if c is not None]
        if kept:
            found[table.suite.rows[cell.row].label or cell.row] = kept
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(c.loss[-1] for c in item[1])))


def rows_of(found: dict[str, list[Curve]], targets: list[float]) -> list[dict[str, Any]]:
    """One row a method. A target that some seed never reaches is said with how many do."""
    rows = []
    for label, curves in found.items():
        last = [c.loss[-1] for c in curves]
        row: dict[str, Any] = {
            "method": label,
            "seeds": ", ".join(f"{v:.3f}" for v in last),
            "mean": f"{statistics.fmean(last):.3f}",
            "std": f"{statistics.stdev(last):.3f}" if len(last) > 1 else "",
            "MB sent": round(curves[0].at["bytes"][-1], 1),
        }
        for target in targets:
            for axis, word in (("rounds", "exchanges"), ("bytes", "MB")):
                reached = [x for c in curves if (x := c.reach(target, axis)) is not None]
                text = f"{statistics.fmean(reached):.{0 if axis == 'rounds' else 1}f}" if reached else "-"
                few = f" ({len(reached)} of {len(curves)})" if 0 < len(reached) < len(curves) else ""
                row[f"{word} to {target:g}"] = text + few
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[n]) for n in names) + " |" for row in rows)]) + "\n"


def figure(found: dict[str, list[Curve]], path: Path) -> None:
    """Mean over the seeds against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(2, 2, figsize=(10, 8), sharey=True)
    for number, (label, curves) in enumerate(found.items()):
        losses = [statistics.fmean(values) for values in zip(*(c.loss for c in curves), strict=True)]
        for panel, (axis, title) in zip(axes.flat, AXES.items(), strict=True):
            panel.plot(curves[0].at[axis], losses, label=label, linewidth=1.3, linestyle=("-", "--", ":")[number // 10 % 3])
            panel.set(xlabel=title)
            if axis in ("rounds", "bytes"):
                panel.set(xscale="log")
    for panel in axes[:, 0]:
        panel.set(ylabel="validation loss of x_t, nats per byte")
    lowest = min(min(c.loss) for curves in found.values() for c in curves)
    axes[0, 0].set(ylim=(lowest - 0.05, lowest + 1.5))
    axes[0, 0].legend(fontsize=7, loc="upper right")
    picture.tight_layout()
    picture.savefig(path)


def put(page: Path, rows: list[dict[str, Any]], found: dict[str, list[Curve]], targets: list[float]) -> None:
    """Between ``<!-- study -->`` and ``<!-- /study -->`` of a page: the table and the figure."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- study -->")
    _, mark, after = rest.partition("<!-- /study -->")
    if not mark:
        raise SystemExit(f"{page} has no <!-- study --> and <!-- /study -->")
    seeds = {len(curves) for curves in found.values()}
    levels = " and ".join(f"{t:g}" for t in targets)
    said = (
        f"**The chosen recipes with other seeds** ({' or '.join(map(str, sorted(seeds)))} a method; `python benchmarks/pretrain_study.py`),"
        f" with the exchanges and the megabytes sent by one worker until the loss first is {levels}:\n\n"
    )
    picture = "![Validation loss against steps, tokens, exchanges and megabytes sent, means over the seeds](images/pretrain_tuned.svg)"
    figure(found, page.parent / "images" / "pretrain_tuned.svg")
    page.write_text(f"{before}<!-- study -->\n{said}{markdown(rows)}\n{picture}\n<!-- /study -->{after}", encoding="utf-8")


def ratios_of(found: dict[str, list[Curve]], target: float) -> list[Ratio]:
    """Exchanges and bytes of DSM against its two references; losses to read."""

    def mean(label: str, axis: str) -> float | None:
        reached = [c.reach(target, axis) for c in found.get(label, [])]
        known = [x for x in reached if x is not None]
        return statistics.fmean(known) if reached and len(known) == len(reached) else None

    made = []
    for other in ("AdamW, every step", "DiLoCo"):
        for axis in ("rounds", "bytes"):
            ours, theirs = mean("DSM", axis), mean(other, axis)
            value = ours / theirs if ours is not None and theirs else None
            word = "exchanges" if axis == "rounds" else "bytes"
            made.append(Ratio(f"{word} to a loss of {target:g}, DSM / {other}", value, "", "" if value else "a seed never reaches it"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--targets", type=float, nargs="+", help="losses to reach; left out: 2.5 and 2.3")
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--page", type=Path, help="put table and figure between the marks of this page, the figure beside it in images/")
    arguments(parser)
    given = parser.parse_args()
    if not given.read:
        command = [sys.executable, "-m", "xutrain", "sweep", SUITE, "--out", str(given.out), *(["--smoke"] if given.quick else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = study(given.out, given.quick)
    if not found:
        raise SystemExit(f"no finished run of {SUITE} under {given.out}: leave out --read")
    targets = given.targets or ([4.5] if given.quick else [2.5, 2.3])
    rows = rows_of(found, targets)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "study.md").write_text(markdown(rows), encoding="utf-8")
    figure(found, given.out / "study.svg")
    print(markdown(rows))
    ratios = ratios_of(found, targets[0])
    if given.page:
        put(given.page, rows, found, targets)
    for ratio in ratios:
        print(f"{ratio.name}: {'-' if ratio.value is None else f'{ratio.value:.3g}'}")
    write(given.json, "Sign momentum against its baselines: rounds and bytes to a loss", rows, ratios)


if __name__ == "__main__":
    main()
