"""A run's record for other tools: CSV, TensorBoard event files, a Weights & Biases run. Reads the run folder, changes nothing in it."""

from __future__ import annotations

import csv
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xutrain.errors import Failed, Issue, UsageError
from xutrain.recipe import yamlfile
from xutrain.recipe.schema import Log
from xutrain.report.runs import Run

TOOLS = ("wandb", "tensorboard", "csv")
#: keys of a line that say where and when its value came; all others but name and value are tags (client, stage, point)
_PLACE = ("step", "round", "epoch", "split", "bits_up", "bits_down", "wall_s", "seed")


def export(run: Run, tool: str, out: Path, *, online: bool = False, project: str = "xutrain") -> Path:
    """Write one run for ``tool`` (wandb, tensorboard or csv) below ``out``; returns the file or folder. An earlier export goes.

    Raises:
        UsageError: a run without values. Failed: the tool is not installed, or wandb could not be reached.
    """
    if not run.lines:
        raise UsageError(Issue(str(run.folder), "has no values yet: its metrics.jsonl is missing or empty", has_value=False))
    out.mkdir(parents=True, exist_ok=True)
    return {"csv": _csv, "tensorboard": _tensorboard}[tool](run, out) if tool != "wandb" else _wandb(run, out, online, project)


def name_of(run: Run) -> str:
    """verb-recipe-hash-seed: a folder name that tells runs apart."""
    head = run.run
    return f"{head.get('verb')}-{head.get('recipe')}-{run.group}-seed{run.seed}".replace("/", "-")


def _csv(run: Run, out: Path) -> Path:
    tags = sorted({key for line in run.lines for key in line} - {*_PLACE, "name", "value"})
    path = out / "metrics.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["step", "round", "epoch", *tags, "split", "name", "value", "bits_up", "bits_down", "wall_s", "seed"])
        table.writeheader()
        table.writerows(run.lines)
    return path


def _groups(run: Run) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Lines of one step and moment together: the first of them, and name -> value; a tag is part of the name."""
    for _, group in itertools.groupby(run.lines, key=lambda line: (line["step"], line.get("wall_s"))):
        lines = list(group)
        values = {}
        for line in lines:
            tags = "".join(f"/{k}_{line[k]}" for k in sorted(line.keys() - {*_PLACE, "name", "value"}))
            if line["value"] is not None:
                values[f"{line['name']}{tags}"] = float(line["value"])
        yield lines[0], values


def _tensorboard(run: Run, out: Path) -> Path:
    from xutrain.engine.sinks import TensorBoard

    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    try:
        sink = TensorBoard(out)
    except ImportError:
        raise Failed(Issue("--to", "TensorBoard is not installed", "tensorboard", "pip install 'xutrain[tensorboard]'")) from None
    started = float(run.state.get("updated") or 0.0) - max(float(line.get("wall_s") or 0.0) for line in run.lines)
    for line, values in _groups(run):
        sink.clock = started + float(line.get("wall_s") or 0.0)
        sink.values(int(line["step"]), {**values, "bits_up": line["bits_up"], "bits_down": line["bits_down"]})
    sink.close()
    return out / "tensorboard"


def _wandb(run: Run, out: Path, online: bool, project: str) -> Path:
    from xutrain.engine.sinks import Wandb

    recipe = yamlfile.read(run.folder / "recipe.yaml")[0]
    log = Log(wandb="online" if online else "offline", project=project)
    identity = name_of(run)[-100:]
    sink = Wandb(out, f"{run.run.get('recipe')} seed {run.seed}", recipe, log, run.group, identity)
    if sink.failure:
        hint = "wandb login, or leave --online out: an offline export is sent later by `wandb sync`"
        raise Failed(Issue("--to", f"Weights & Biases did not take the run: {sink.failure}", "wandb", hint))
    for line, values in _groups(run):
        place = {k: line[k] for k in ("round", "epoch", "bits_up", "bits_down", "wall_s") if line.get(k) is not None}
        sink.values(int(line["step"]), {**place, **values})
    sink.summary({**run.metrics, **run.bits})
    sink.close()
    return out / "wandb"
