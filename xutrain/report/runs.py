"""Run folders as a report reads them: finished, unchanged since, and what their recipe says they are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xutrain.engine.record import metrics_digest, read_json, read_metrics, result_digest
from xutrain.errors import Failed, Issue, UsageError, XutrainError
from xutrain.recipe import yamlfile
from xutrain.recipe.identity import OUTSIDE

#: keys of a line that says nothing of one client, stage or point
_PLAIN = {"step", "round", "epoch", "split", "name", "value", "bits_up", "bits_down", "wall_s", "seed"}
#: values on one curve after thinning
POINTS = 300


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    run: dict[str, Any]
    state: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.run.get("seed", 0))

    @property
    def status(self) -> str:
        return str(self.state.get("status", "queued"))

    @property
    def result(self) -> dict[str, Any]:
        found = self.state.get("result")
        return found if isinstance(found, dict) else {}

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics; those that are not numbers are left out."""
        found = self.result.get("metrics", {})
        return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and math.isfinite(v)}

    @property
    def bits(self) -> dict[str, float]:
        return {f"bits_{k}": float(v) for k, v in self.result.get("bits", {}).items()}

    @property
    def group(self) -> str:
        return str(self.run.get("group", ""))

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        return list(read_metrics(self.folder))

    def curve(self, name: str) -> list[dict[str, Any]]:
        """All lines of one metric that carry no further tag, newest last; one a step."""
        found: dict[int, dict[str, Any]] = {}
        for line in self.lines:
            if line["name"] == name and line["value"] is not None and line.keys() <= _PLAIN:
                found[line["step"]] = line
        return [found[step] for step in sorted(found)]

    @cached_property
    def _named(self) -> dict[tuple[str, int], float]:
        return {(line["name"], line["step"]): line["value"] for line in self.lines if line["value"] is not None}

    def at(self, step: int, name: str) -> float | None:
        """What was logged under a name at a step."""
        return self._named.get((name, step))

    def trace(self) -> dict[str, Any]:
        """Where a number comes from."""
        git = self.run.get("git", {})
        return {
            "folder": str(self.folder),
            "seed": self.seed,
            "status": self.status,
            "commit": git.get("commit", ""),
            "dirty": bool(git.get("dirty", False)),
            "recipe_hash": self.group,
            "xutrain": self.run.get("versions", {}).get("xutrain", ""),
            "wall_s": self.result.get("wall_s"),
        }


def thinned(steps: list[int]) -> list[int]:
    """Evenly chosen steps, at most about ``POINTS``; the last is always among them."""
    stride = max(1, -(-len(steps) // POINTS))
    return steps[::stride] + (steps[-1:] if steps and (len(steps) - 1) % stride else [])


def read(folder: Path) -> Run:
    """A run folder. Raises Failed where its record was changed after the run ended; says which file."""
    run = Run(folder, read_json(folder / "run.json"), read_json(folder / "state.json"))
    if run.status == "done":
        _verify(run)
    return run


def read_all(folders: Iterable[Path]) -> list[Run]:
    """Every folder, by seed. Raises with the faults of all of them at once."""
    runs, wrong = [], []
    for folder in folders:
        try:
            runs.append(read(folder))
        except XutrainError as error:
            wrong += error.issues
    if wrong:
        raise Failed(*wrong)
    return sorted(runs, key=lambda r: (r.seed, str(r.folder)))


def _verify(run: Run) -> None:
    hint = f"run it again with --fresh; `xutrain runs rm {run.folder}` removes it"
    wrong: list[Issue] = []
    if run.state.get("metrics_sha256") != metrics_digest(run.folder):
        what = "was changed after the run ended: its checksum differs from state.json"
        wrong.append(Issue(str(run.folder / "metrics.jsonl"), what, hint=hint, has_value=False))
    if run.state.get("result_sha256") != result_digest(run.result):
        what = "was changed after the run ended: its result differs from its checksum"
        wrong.append(Issue(str(run.folder / "state.json"), what, hint=hint, has_value=False))
    said = identity(run.folder / "recipe.yaml")
    if run.group and said != run.group:
        what = "does not say what ran: its identity differs from run.json"
        wrong.append(Issue(str(run.folder / "recipe.yaml"), what, said, f"it was {run.group}; {hint}"))
    if wrong:
        raise Failed(*wrong)


def identity(path: Path) -> str:
    """The group id of a resolved recipe on disk, as xutrain.recipe.identity computes it of a recipe in memory."""
    value = {k: v for k, v in yamlfile.read(path)[0].items() if k not in OUTSIDE}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def agree(runs: list[Run], where: str) -> None:
    """Runs that are to be averaged must be the same experiment, each seed once. Raises UsageError."""
    hashes = {r.group: r for r in runs}
    if len(hashes) > 1:
        first, second = list(hashes.values())[:2]
        what = f"the runs {first.folder} and {second.folder} disagree on their recipe ({first.group}, {second.group})"
        raise UsageError(Issue(where, what, has_value=False, hint=f"see where: xutrain diff {first.folder} {second.folder}"))
    seeds: dict[int, Run] = {}
    for run in runs:
        if run.seed in seeds:
            raise UsageError(
                Issue(where, f"the runs {seeds[run.seed].folder} and {run.folder} have the same seed", run.seed, "leave one of them out")
            )
        seeds[run.seed] = run


def below(paths: list[Path]) -> list[Path]:
    """Run folders at or below ``paths``. Raises UsageError where there are none."""
    found: list[Path] = []
    for path in paths:
        here = sorted(f.parent for f in path.rglob("run.json") if (f.parent / "recipe.yaml").exists()) if path.is_dir() else []
        if not here:
            raise UsageError(
                Issue("RUNS", "holds no run folder", str(path), "what is there: xutrain runs ls; all suites: xutrain ls suites")
            )
        found += [f for f in here if f not in found]
    return found
