"""kill -9 of a rank, of the torchrun agent, of the launcher of a real job: no orphan stays, and the resumed run is the same."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xutrain.engine.record import read_json, read_metrics

_spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec and _spec.loader
_shared: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

RUNS = {
    "quantize/orq": ["train.steps=1500", "checkpoint.every=20", "eval.every=1500", "log.every=10", "model.hidden=[16]"],
    "pretrain/dsm": ["train.steps=400", "checkpoint.every=5", "log.every=1"],
}


def _processes(folder: Path) -> dict[int, str]:
    """Processes that name the run folder: the launcher does not, agent and ranks do."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                dead = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
            except OSError:
                continue
            if str(folder) in words and not dead:
                found[int(entry.name)] = "agent" if "torch.distributed.run" in words else "rank"
    return found


def _wait_for(what: Callable[[], object], seconds: float, name: str) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds} s for {name}"
        time.sleep(0.05)


def _killed(who: str, recipe: str, runs: Path) -> None:
    from xutrain.launch.plan import plan
    from xutrain.launch.run import launch
    from xutrain.recipe.load import load

    verb, name = recipe.split("/")
    over = RUNS[recipe]
    prepared = plan(load(name, verb, over, smoke=True), out=runs / "cut", verbosity=-1)
    folder = prepared.folder
    line = [sys.executable, "-m", "xutrain", verb, "--config", name, "--smoke", *over, "--nproc", "2", "--out", str(runs / "cut"), "-q"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        try:
            _wait_for(lambda: any(v["step"] >= 20 for v in read_metrics(folder)), 120, "20 steps")
            there = _processes(folder)
            assert sorted(there.values()) == ["agent", "rank", "rank"], there
            victim = launcher.pid if who == "launcher" else min(p for p, kind in there.items() if kind == who)
            os.kill(victim, signal.SIGKILL)
            _, told = launcher.communicate(timeout=90)
            _wait_for(lambda: not _processes(folder), 60, f"the end of {_processes(folder)}")
        finally:
            for pid in _processes(folder):
                os.kill(pid, signal.SIGKILL)
    assert read_json(folder / "state.json")["status"] != "done", "it ended before the kill"
    if who != "launcher":
        assert launcher.returncode == 1 and "error:" in told and "Traceback" not in told, told
        assert read_json(folder / "state.json")["status"] == "failed"
    assert launch(prepared)["exit_code"] == 0, "the same run, now in one process"
    whole = plan(load(name, verb, over, smoke=True), out=runs / "whole", verbosity=-1)
    assert launch(whole)["exit_code"] == 0
    assert _shared.weights(folder) == _shared.weights(whole.folder)
    assert _shared.values(folder) == _shared.values(whole.folder)


def test_a_rank_is_killed(runs: Path) -> None:
    _killed("rank", "quantize/orq", runs)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(RUNS))
@pytest.mark.parametrize("who", ["rank", "agent", "launcher"])
def test_any_of_them_is_killed(who: str, recipe: str, runs: Path) -> None:
    _killed(who, recipe, runs)
