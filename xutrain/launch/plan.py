"""What would run, where, and what it would cost: a value that a dry run prints and a launch carries out."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from xutrain.engine.record import read_json, write_json
from xutrain.errors import Issue, UsageError
from xutrain.recipe import yamlfile
from xutrain.recipe.identity import group_id
from xutrain.recipe.load import Loaded
from xutrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Forecast:
    """A run in closed form: steps (rounds, events), bits over all participants, and whatever else a verb predicts."""

    steps: int
    up: int
    down: int
    participants: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> dict[str, float]:
        return bits_summary(self.up, self.down, self.participants, self.steps)


def bits_summary(up: int, down: int, participants: int, steps: int) -> dict[str, float]:
    """The ``bits`` object of a result: totals over all participants, and the mean message of one participant per step."""
    each = up / (participants * steps) if participants and steps else 0.0
    return {"up": up, "down": down, "per_worker_step": int(each) if each == int(each) else each}


@dataclass(frozen=True)
class RunPlan:
    """One run: a recipe with its seed, a folder, and how it is launched."""

    loaded: Loaded
    folder: Path
    nproc: int
    launcher: str
    verbosity: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def describe(self) -> dict[str, Any]:
        """The head of the result's JSON."""
        return {
            "run": str(self.folder),
            "recipe": self.loaded.name,
            "verb": self.loaded.verb,
            "method": self.recipe.method_name,
            "codec": self.recipe.codec_name,
            "seed": self.recipe.seed,
        }

    def write(self) -> None:
        """Create the run folder with everything that a worker needs: its only input."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        recipe = self.recipe.model_dump(mode="json")
        (self.folder / "recipe.yaml").write_text(yamlfile.dump(recipe), encoding="utf-8")
        (self.folder / "source.yaml").write_text(self.loaded.source, encoding="utf-8")
        (self.folder / "overrides.txt").write_text("".join(f"{o}\n" for o in self.loaded.overrides), encoding="utf-8")
        earlier = read_json(self.folder / "run.json")
        value = {
            **self.describe(),
            "group": group_id(self.recipe),
            "participants": self.recipe.participants,
            "nproc": self.nproc,
            "nproc_before": earlier.get("nproc"),
            "launcher": self.launcher,
            "verbosity": self.verbosity,
            "versions": versions(),
            "git": git_state(),
            "host": {"name": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "starts": [*_list(earlier.get("starts")), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")],
            "notes": _list(earlier.get("notes")),
        }
        write_json(self.folder / "run.json", value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """One launcher a run folder. Raises UsageError where another holds it."""
    lock = FileLock(str(folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = f"process {pid} runs it; " if (pid := read_json(folder / "state.json").get("pid")) else ""
        hint = f"{who}stop it with `xutrain runs stop {folder}`, or give another --out"
        raise UsageError(Issue(str(folder), "is being run by another xutrain", has_value=False, hint=hint)) from None
    try:
        yield
    finally:
        lock.release()


def plan(loaded: Loaded, *, out: Path, nproc: int = 1, launcher: str | None = None, fresh: bool = False, verbosity: int = 0) -> RunPlan:
    """The plan of one run. Raises UsageError where the number of processes does not fit the recipe."""
    check_processes(loaded.recipe, nproc)
    recipe = loaded.recipe
    folder = out / loaded.verb / loaded.name / group_id(recipe) / f"seed{recipe.seed}"
    if fresh and folder.exists():
        with run_lock(folder):  # never from under a run
            folder.rename(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    return RunPlan(loaded, folder, nproc, launcher or ("local" if nproc == 1 else "torchrun"), verbosity)


def check_processes(recipe: Recipe, nproc: int) -> None:
    """P must divide N, so that every process hosts as many participants."""
    count = recipe.participants
    if nproc < 1 or count % nproc:
        allowed = [p for p in range(1, min(count, 4096) + 1) if count % p == 0]
        hint = f"use one of {', '.join(map(str, allowed[:12]))}, or change {recipe.participants_key}"
        raise UsageError(Issue("--nproc", f"does not divide {recipe.participants_key}={count}", nproc, hint))


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("xutrain", "torch", "torchvision", "numpy", "transformers", "monai"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """The commit of the checkout that runs, and whether files differ from it; empty outside a checkout."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return {}
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(changed.stdout.strip())} if commit.returncode == 0 else {}
