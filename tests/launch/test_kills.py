"""kill -9 at random moments, for every verb: the run goes on from its last checkpoint and ends with the same bytes."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec and _spec.loader
_shared: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
weights, values = _shared.weights, _shared.values

#: verb/recipe and overrides that make a run of about a second with a checkpoint at every step
RUNS = {
    "quantize/orq": ["train.steps=30", "checkpoint.every=1", "eval.every=5", "log.every=1", "model.hidden=[16]"],
    "sparsify/def": ["train.steps=30", "checkpoint.every=1", "eval.every=5", "log.every=1", "model.hidden=[16]"],
    "federate/domo": ["checkpoint.every=1"],
    "federate/fedsm": ["checkpoint.every=1"],
    "federate/auto_fedrl": ["checkpoint.every=1"],
    "pipeline/dsp": ["checkpoint.every=2"],
    "vertical/afsgd": ["checkpoint.every=200"],
    "prune/distill": ["distill.steps=6", "checkpoint.every=1", "log.every=1"],
    "pretrain/dsm": ["checkpoint.every=2", "log.every=1"],
}


def _start(folder: Path) -> int:
    from xutrain.worker import execute

    return execute(folder)


def _progress(folder: Path) -> int:
    """How much a run has written: lines of metrics and checkpoints."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    return lines + len(list((folder / "checkpoints").glob("step-*")))


def _kill_after(folder: Path, more: int) -> bool:
    """Run in a forked process and kill it once it has written ``more`` things; whether it was still running."""
    before = _progress(folder)
    child = multiprocessing.get_context("fork").Process(target=_start, args=(folder,), daemon=True)
    child.start()
    while child.is_alive() and _progress(folder) - before < more:
        time.sleep(0.002)
    alive = child.is_alive()
    if alive:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return alive


@pytest.mark.parametrize("recipe", list(RUNS))
def test_killed_and_resumed_is_the_same_run(trained: Callable[..., Path], runs: Path, recipe: str) -> None:
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    over = RUNS[recipe]
    loaded = load(recipe, None, over, smoke=True)
    whole, cut = (plan(loaded, out=runs / name, verbosity=-1) for name in ("whole", "cut"))
    for each in (whole, cut):
        each.write()
    assert _start(whole.folder) == 0
    moments = random.Random(recipe)
    killed = sum(_kill_after(cut.folder, moments.randint(1, 6)) for _ in range(4))
    assert killed > 0
    assert _start(cut.folder) == 0
    assert weights(cut.folder) == weights(whole.folder)
    assert values(cut.folder) == values(whole.folder)
    assert not list((cut.folder / "checkpoints").glob(".*.aside*"))


@pytest.mark.parametrize("recipe", list(RUNS))
def test_killed_before_the_first_checkpoint(runs: Path, recipe: str) -> None:
    """The lines that the killed start wrote are not kept beside those of the next."""
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    over = RUNS[recipe]
    whole, cut = (plan(load(recipe, None, over, smoke=True), out=runs / name, verbosity=-1) for name in ("whole", "cut"))
    for prepared in (whole, cut):
        prepared.write()
    assert _start(whole.folder) == 0
    (cut.folder / "metrics.jsonl").write_text(
        "".join((whole.folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "na'
    )
    assert _start(cut.folder) == 0
    assert values(cut.folder) == values(whole.folder)


@pytest.mark.parametrize(("recipe", "torn"), [*((recipe, 0) for recipe in RUNS), ("prune/distill", 40)])
def test_killed_when_all_but_the_result_was_written(runs: Path, recipe: str, torn: int) -> None:
    """After the last metric, or in the middle of its line where no checkpoint follows: it is not written twice, nor lost."""
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    prepared = plan(load(recipe, None, RUNS[recipe], smoke=True), out=runs / "cut", verbosity=-1)
    prepared.write()
    assert _start(prepared.folder) == 0
    state, before, bytes_before = _state(prepared.folder), values(prepared.folder), weights(prepared.folder)
    file = prepared.folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[: -torn or None])
    (prepared.folder / "state.json").write_text(json.dumps({"status": "running"}))
    assert _start(prepared.folder) == 0
    assert values(prepared.folder) == before
    assert weights(prepared.folder) == bytes_before
    assert _state(prepared.folder) == state


def _state(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "state.json").read_text())["result"]
    return {k: result[k] for k in ("metrics", "bits", "status")}
