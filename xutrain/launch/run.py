"""Carry out a plan: in this process or under torchrun, at most one launcher per run folder. Torch-free until a run starts."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from xutrain.engine.record import read_json, read_metrics, write_json
from xutrain.launch.plan import RunPlan, bits_summary, run_lock
from xutrain.launch.torchrun import processes_lock, run_processes
from xutrain.report import runs as run_folders

#: status of a run -> exit code of the command line
EXIT_CODES = {"done": 0, "failed": 1, "diverged": 4, "stopped": 75}


def launch(plan: RunPlan) -> dict[str, Any]:
    """Run, resume or recall a run; returns its result (the JSON of the command line, plus "exit_code" and "error").

    Raises:
        UsageError: another launcher holds the run folder.
        Failed: a finished run's record was changed by hand.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with run_lock(plan.folder), processes_lock(plan.folder) as processes:
        state = read_json(plan.folder / "state.json")
        if state.get("status") == "done":
            result = run_folders.read(plan.folder).result
            return {**result, "run": str(plan.folder), "exit_code": 0, "recalled": True}
        began = bool(state) or bool(read_json(plan.folder / "run.json").get("starts"))
        plan.write()
        for old in (plan.folder / "logs").glob("fault-*.json"):
            old.unlink()
        if began:  # a request to stop was meant for the start before this one
            with contextlib.suppress(FileNotFoundError):
                (plan.folder / "STOP").unlink()
            # how that start ended says nothing of this one, whose processes may die before they can say "running"
            kept = {k: v for k, v in state.items() if k not in ("error", "exit_code")}
            write_json(plan.folder / "state.json", {**kept, "status": "queued", "updated": time.time()})
        return collect(plan, _start(plan, processes))


def _start(plan: RunPlan, lock: int) -> int:
    if plan.nproc == 1:
        from xutrain.worker import execute  # imports torch

        return execute(plan.folder)
    return run_processes(plan.folder, plan.nproc, plan.verbosity, lock)


def collect(plan: RunPlan, code: int) -> dict[str, Any]:
    """The result of a run that has just ended, from its folder; settles state.json where a process died without a word."""
    state = settle(plan.folder, code)
    if state["status"] == "done":
        return {**state["result"], "exit_code": 0}
    lines = list(read_metrics(plan.folder))
    last = lines[-1] if lines else {}
    bits = bits_summary(last.get("bits_up", 0), last.get("bits_down", 0), plan.recipe.participants, last.get("step", 0))
    wall = last.get("wall_s", 0.0)
    exit_code = 130 if code == 130 else state.get("exit_code") or EXIT_CODES.get(state["status"], 1)
    latest = {str(line["name"]): line["value"] for line in lines if line["split"] in ("test", "val")}
    return {
        **plan.describe(),
        "status": state["status"],
        "scale": plan.recipe.scale,
        "metrics": latest,
        "bits": bits,
        "wall_s": wall,
        "exit_code": exit_code,
        "error": state.get("error", []),
    }


def settle(folder: Path, code: int) -> dict[str, Any]:
    """The state of a run whose processes have ended with ``code``, written down where they could not do it themselves."""
    state = read_json(folder / "state.json")
    if state.get("status") in ("running", "queued", None) or (code != 0 and state.get("status") == "done"):
        state = {**state, **_cause(folder, code), "updated": time.time()}
        write_json(folder / "state.json", state)
    return state


def _cause(folder: Path, code: int) -> dict[str, Any]:
    """The first fault that a process wrote down, or what torchrun saw."""
    faults = sorted((read_json(f) for f in (folder / "logs").glob("fault-*.json")), key=lambda f: f.get("time", 0.0))
    seen = read_json(folder / "logs" / "first-failure.json")
    killed = int(seen.get("exitcode", 0)) < 0  # by a signal: what the survivors tell is then of broken connections
    told = [f for f in faults if f.get("exit_code") != 1] or ([] if killed else faults)
    if told:
        return {key: told[0][key] for key in ("status", "exit_code", "error") if key in told[0]}
    who = f"rank {seen['rank']} ended with exit code {seen['exitcode']}" if seen else f"a process ended with exit code {code}"
    pulse = folder / "logs" / f"pulse-{seen.get('rank')}"  # pipelines leave the iteration that a process was in
    if pulse.is_file():
        who += f" in iteration {pulse.read_text(encoding='utf-8').strip()}"
    text = [
        f"error: {who} without a message (killed, or out of memory)",
        f"hint: see {folder / 'logs'}; the same command goes on from the last checkpoint",
    ]
    return {"status": "failed", "exit_code": 1, "error": text}


def public(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the keys of the contract only."""
    hidden = {"exit_code", "recalled"} | (set() if result.get("error") else {"error"})
    return {key: value for key, value in result.items() if key not in hidden}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result, or several seeds under "runs" with "mean" and "std" (sample deviation, n-1) of every metric."""
    if len(results) == 1:
        return public(results[0])
    import statistics

    names = [n for n in results[0]["metrics"] if all(isinstance(r["metrics"].get(n), (int, float)) for r in results)]
    values = {n: [float(r["metrics"][n]) for r in results] for n in names}
    return {
        "runs": [public(r) for r in results],
        "mean": {n: statistics.fmean(v) for n, v in values.items()},
        "std": {n: statistics.stdev(v) for n, v in values.items()},
    }


def dump(value: Any) -> str:
    """JSON text without NaN."""
    return json.dumps(value, indent=2, allow_nan=False)
