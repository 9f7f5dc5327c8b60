"""A run goes on with another number of processes: it says so, and ends with the same bytes, for every verb."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from xutrain.engine.record import read_json
from xutrain.families import FAMILIES
from xutrain.launch import compare

_spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec and _spec.loader
_shared: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

#: verb/recipe: overrides of its smoke run, the other number of processes, after how many steps it is stopped
RUNS: dict[str, tuple[list[str], int, tuple[int, int]]] = {
    "quantize/orq": (["train.steps=12", "model.hidden=[16]", "log.every=1"], 2, (3, 7)),
    "sparsify/def": (["train.steps=12", "model.hidden=[16]", "log.every=1"], 4, (3, 7)),
    "federate/domo": (["log.every=1"], 2, (1, 2)),
    "federate/fedsm": (["log.every=1"], 3, (1, 2)),
    "federate/auto_fedrl": (["log.every=1"], 2, (1, 2)),
    "pipeline/dsp": (["runtime={poll: 1, drain: end}"], 3, (9, 20)),
    "vertical/afsgd": ([], 3, (900, 1900)),
    "prune/distill": (["distill.steps=4", "checkpoint.every=1", "log.every=1"], 2, (1, 4)),
    "pretrain/dsm": (["train.steps=12", "log.every=1"], 2, (3, 7)),
}


def test_every_verb_is_here() -> None:
    assert {recipe.split("/")[0] for recipe in RUNS} == set(FAMILIES)


def _start(recipe: str, out: Path, processes: int, stop: int | None = None) -> Path:
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    over, _, _ = RUNS[recipe]
    prepared = plan(load(recipe, None, over, smoke=True), out=out, nproc=processes, verbosity=-1)
    prepared.write()
    file = prepared.folder / "STOP"
    if stop is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(f"{stop}\n")
    _shared.run_forked(_shared._execute, processes, prepared.folder)
    status = read_json(prepared.folder / "state.json")["status"]
    assert status == ("done" if stop is None else "stopped"), (status, read_json(prepared.folder / "state.json"))
    return prepared.folder


@pytest.mark.parametrize("recipe", list(RUNS))
def test_on_one_then_on_several_then_on_one(runs: Path, recipe: str) -> None:
    _, other, (first, second) = RUNS[recipe]
    whole = _start(recipe, runs / "whole", 1)
    _start(recipe, runs / "parts", 1, first)
    _start(recipe, runs / "parts", other, second)
    parts = _start(recipe, runs / "parts", 1)
    said = " ".join(read_json(parts / "run.json")["notes"])
    assert f"goes on with {other} processes after 1" in said and f"goes on with 1 process after {other}" in said, said
    newest = [max((folder / "checkpoints").glob("step-*")) for folder in (parts, whole)]
    assert newest[0].name == newest[1].name
    for look in (compare._state, lambda p: compare._files(p.parents[1]), lambda p: {"metrics": _shared.values(p.parents[1])}):
        found = compare._in_values(None, look(newest[0]), look(newest[1]))
        assert found is None, compare.sentence(found)
