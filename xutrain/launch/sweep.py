"""Run what is missing of a suite: cells as runs, spread over processes of one thread each; finished ones are never run again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from xutrain.engine.record import read_json, write_json
from xutrain.errors import Failed, Issue, RecipeError, XutrainError
from xutrain.launch.plan import RunPlan, check_processes, plan
from xutrain.launch.run import launch
from xutrain.launch.torchrun import die_with_parent
from xutrain.recipe.load import Loaded, load
from xutrain.report.suite import Cell, Table

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    cell: Cell
    seed: int
    plan: RunPlan

    @property
    def title(self) -> str:
        return f"{self.cell.key} seed {self.seed}"

    @property
    def status(self) -> str:
        return str(read_json(self.plan.folder / "state.json").get("status", "missing"))

    @property
    def ended(self) -> bool:
        """The run has an outcome: it is recalled and not run again."""
        return self.status in ("done", "diverged")


def prepare(table: Table, *, out: Path, nproc: int = 1, fresh: bool = False, launcher: str | None = None) -> list[Job]:
    """The runs of a suite, first seeds first; validates every cell before ``fresh`` moves a folder.

    Raises RecipeError with the faults of all cells, UsageError where ``nproc`` does not fit one.
    """
    jobs: list[Job] = []
    wrong: dict[tuple[str, str], Issue] = {}
    ready: dict[str, Loaded] = {}
    for cell in table.cells:
        try:
            ready[cell.key] = load(cell.recipe, None, cell.overrides, smoke=table.smoke)
            check_processes(ready[cell.key].recipe, nproc)
        except RecipeError as error:
            for issue in error.issues:
                where = f"suite {table.name}, {cell.key}: {issue.where}"
                wrong[issue.where, issue.what] = Issue(where, issue.what, issue.value, issue.hint, issue.has_value)
    if wrong:
        raise RecipeError(*wrong.values())
    for seed in table.seeds:
        for cell in table.cells:
            loaded = ready[cell.key]
            seeded = replace(loaded, recipe=loaded.recipe.model_copy(update={"seed": seed}))
            jobs.append(Job(cell, seed, plan(seeded, out=out, nproc=nproc, fresh=fresh, launcher=launcher, verbosity=-1)))
    return jobs


def write_manifest(table: Table, jobs: list[Job], out: Path) -> Path:
    """Say which run folders are a suite's cells, for the report; keeps what earlier sweeps of the same cells said."""
    path = out / "suites" / table.manifest
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_json(path).get("cells", {})
    cells: dict[str, Any] = {k: v for k, v in known.items() if isinstance(v, dict)}
    for job in jobs:
        earlier = cells.get(job.cell.key, {})
        same = earlier.get("spec") == job.cell.spec
        folder = str(job.plan.folder.parent.relative_to(out))
        seeds = {*(earlier.get("seeds", []) if same and earlier.get("folder") == folder else []), job.seed}
        cells[job.cell.key] = {"spec": job.cell.spec, "folder": folder, "seeds": sorted(seeds)}
    write_json(path, {"suite": table.name, "scale": table.scale, "smoke": table.smoke, "cells": dict(sorted(cells.items()))})
    return path


def carry_out(jobs: list[Job], count: int, tell: Tell, *, again: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """Run every job that is not finished, ``count`` at a time.

    Returns one result a job, in order, and whether the sweep was asked to stop: a first INT or TERM asks the running ones
    to stop at a step boundary, with a checkpoint; a second ends them.
    """
    stopped = False
    results: dict[int, dict[str, Any]] = {}
    todo: list[int] = []
    first: dict[Path, int] = {}
    for index, job in enumerate(jobs):
        if first.setdefault(job.plan.folder, index) != index:
            continue  # the same experiment in two cells
        if job.ended and not (again and job.status == "diverged"):
            results[index] = _recall(job)
        else:
            todo.append(index)
    if results:
        tell(f"{len(results)} of {len(first)} runs were finished before")
    if todo:
        pool = _Pool(jobs, todo, results, min(count, len(todo)), tell)
        pool.run()
        stopped = pool.interrupts > 0
    return [results[first[job.plan.folder]] for job in jobs], stopped


def _recall(job: Job) -> dict[str, Any]:
    state = read_json(job.plan.folder / "state.json")
    if state["status"] == "done":
        return launch(job.plan)
    head = {**job.plan.describe(), "status": state["status"], "scale": job.plan.recipe.scale, "metrics": {}, "recalled": True}
    return {**head, "exit_code": state.get("exit_code", 4), "error": state.get("error", [])}


class _Pool:
    """Processes that take one run after another, so that torch is imported once a process and not once a run."""

    def __init__(self, jobs: list[Job], todo: list[int], results: dict[int, dict[str, Any]], count: int, tell: Tell) -> None:
        self.jobs, self.todo, self.results, self.count, self.tell = jobs, list(todo), results, count, tell
        self.total, self.ended, self.interrupts = len(todo), 0, 0
        self.running: dict[int, tuple[int, float]] = {}
        self.answers: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.started = time.monotonic()

    def run(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, self._hear) for n in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
        try:
            for slot in range(self.count):
                self._begin(slot)
            while self.running:
                with contextlib.suppress(Empty):
                    self._settle(*self.answers.get(timeout=0.5))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in self.processes.values():
                process.kill()
                process.wait()
        for index in self.todo:  # never begun, after a request to stop
            self.results[index] = {**_head(self.jobs[index]), "status": "stopped", "exit_code": 75, "error": []}

    def _begin(self, slot: int) -> None:
        """Give the next run to a process; start the process where there is none."""
        if not self.todo or self.interrupts:
            return
        index = self.todo.pop(0)
        process = self.processes.get(slot)
        if process is None or process.poll() is not None:
            process = self.processes[slot] = _start()
            threading.Thread(target=self._listen, args=(slot, process), daemon=True).start()
        self.running[slot] = (index, time.monotonic())
        with contextlib.suppress(BrokenPipeError):  # the listener tells of a dead process
            assert process.stdin is not None
            process.stdin.write(json.dumps(_request(self.jobs[index])) + "\n")
            process.stdin.flush()

    def _listen(self, slot: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.answers.put((slot, json.loads(line)))
        process.wait()
        self.answers.put((slot, None))

    def _settle(self, slot: int, answer: dict[str, Any] | None) -> None:
        if slot not in self.running:
            return
        index, begun = self.running.pop(slot)
        job = self.jobs[index]
        if answer is None:
            code = self.processes[slot].returncode
            error = [f"error: {job.title}: its process ended with exit code {code} without a message (killed, or out of memory)"]
            stopped = {**_head(job), "status": "stopped", "exit_code": 75, "error": []}
            answer = stopped if self.interrupts else {**_head(job), "status": "failed", "exit_code": 1, "error": error}
        self.results[index] = answer
        self.ended += 1
        took = time.monotonic() - begun
        shown = (
            "  ".join(f"{k} {v:.4g}" for k, v in list(answer["metrics"].items())[-4:] if isinstance(v, float))
            if answer["status"] == "done"
            else ""
        )
        left = (time.monotonic() - self.started) / self.ended * (self.total - self.ended)
        rest = f"  (about {left / 60:.0f} min left)" if left > 90 else ""
        self.tell(f"[{self.ended}/{self.total}] {job.title}: {answer['status']} in {took:.1f} s  {shown}{rest}".rstrip())
        for line in answer.get("error", []):
            self.tell(f"  {line}")
        self._begin(slot)

    def _hear(self, number: int, frame: object) -> None:
        self.interrupts += 1
        if self.interrupts == 1:
            self.tell("asked to stop: running cells save at their next step boundary; the same command goes on from there")
            for process in self.processes.values():
                process.send_signal(signal.SIGTERM)
        else:
            for process in self.processes.values():
                process.kill()


def _head(job: Job) -> dict[str, Any]:
    return {**job.plan.describe(), "scale": job.plan.recipe.scale, "metrics": {}}


def _request(job: Job) -> dict[str, Any]:
    smoke = job.plan.recipe.scale == "smoke"
    head = {"config": job.cell.recipe, "overrides": job.cell.overrides, "seed": job.seed, "smoke": smoke}
    return {**head, "folder": str(job.plan.folder), "out": str(job.plan.folder.parents[3]), "nproc": job.plan.nproc}


def _start() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "xutrain.launch.sweep"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _requests(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield json.loads(line)


def main() -> None:
    """``python -m xutrain.launch.sweep``: runs that arrive as lines of JSON; results leave the same way. Ends with its parent."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a run prints is not an answer
    for wanted in _requests(iter(sys.stdin.readline, "")):
        try:
            loaded = load(wanted["config"], None, wanted["overrides"], smoke=wanted["smoke"], seed=wanted["seed"])
            prepared = plan(loaded, out=Path(wanted["out"]), nproc=wanted["nproc"], verbosity=-1)
            if str(prepared.folder) != wanted["folder"]:
                what = f"was changed while the sweep ran: its run would be {prepared.folder}"
                raise Failed(Issue(wanted["config"], what, has_value=False, hint="start the sweep again"))
            result = launch(prepared)
        except XutrainError as error:
            lines = [line for issue in error.issues for line in issue.lines()]
            head = {"run": wanted["folder"], "recipe": wanted["config"], "seed": wanted["seed"], "metrics": {}}
            result = {**head, "status": "failed", "exit_code": error.exit_code, "error": lines}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
