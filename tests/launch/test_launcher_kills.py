"""kill -9 of a rank, all ranks, torchrun, the launcher of a real job, for every verb: no process stays, and the resumed run is the same.

The moments are random and seeded: some while the processes start, most after so many more writes of the run and a little. Every start is
the same command; it is killed again and again until it has had all of them, and then ends in peace.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xutrain.engine.checkpoint import damage
from xutrain.engine.record import read_json
from xutrain.families import FAMILIES
from xutrain.launch import compare

_spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec and _spec.loader
_shared: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

#: verb/recipe and overrides that make its smoke run write much in a few seconds; two processes each
RUNS = {
    "quantize/orq": ["train.steps=60", "checkpoint.every=1", "eval.every=20", "log.every=1", "model.hidden=[16]"],
    "sparsify/def": ["train.steps=60", "checkpoint.every=1", "eval.every=20", "log.every=1", "model.hidden=[16]"],
    "federate/domo": ["train.rounds=60", "checkpoint.every=1", "log.every=1"],
    "pipeline/dsp": ["stages=2", "method.p=[2,0]", "method.m=[4,0]", "checkpoint.every=1", "log.every=1", "runtime={poll: 1, drain: end}"],
    "vertical/afsgd": ["data.parties=2", "checkpoint.every=60", "eval.every=120"],
    "prune/distill": ["distill.steps=20", "checkpoint.every=1", "log.every=1"],
    "pretrain/dsm": ["train.steps=60", "checkpoint.every=1", "log.every=1", "eval.every=18"],
}
KINDS = ("rank", "ranks", "launcher", "agent")
#: runs that the quick tests kill, and who is killed before the launcher: every kind, in three loops of different make
FIRST = {"quantize/orq": "rank", "pipeline/dsp": "ranks", "vertical/afsgd": "agent"}
MARK = "XUTRAIN_TEST_MARK"


def test_every_verb_is_here() -> None:
    assert {recipe.split("/")[0] for recipe in RUNS} == set(FAMILIES)


class Job:
    """One command line, started again and again; its processes are known by a variable that all descendants inherit."""

    def __init__(self, recipe: str, out: Path) -> None:
        from xutrain.launch.plan import plan
        from xutrain.recipe.load import load

        verb, name = recipe.split("/")
        over = RUNS[recipe]
        self.folder = plan(load(name, verb, over, smoke=True), out=out, verbosity=-1).folder
        words = [verb, "--config", name, "--smoke", *over, "--nproc", "2", "--out", str(out), "-q"]
        self.line = [sys.executable, "-m", "xutrain", *words]
        self.mark = uuid.uuid4().hex

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, MARK: self.mark}
        return subprocess.Popen(
            self.line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def processes(self) -> dict[int, str]:
        """Living processes of this command, whatever their group or parent: launcher, agent, rank, or other."""
        found = {}
        mark = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark not in (entry / "environ").read_bytes().split(b"\0"):
                        continue
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    dead = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
                except OSError:
                    continue
                if not dead:
                    kinds = {b"torch.distributed.run": "agent", b"xutrain.worker": "rank", b"xutrain": "launcher"}
                    found[int(entry.name)] = next((kind for word, kind in kinds.items() if word in words), "other")
        return found

    def written(self) -> tuple[Any, ...]:
        """Changes with everything that the run writes, half a checkpoint included."""
        sizes = [p.stat().st_size for p in (self.folder / "metrics.jsonl", *self.folder.glob("*/.xutrain/journal.jsonl")) if p.exists()]
        places = [p for p in (self.folder / "checkpoints", self.folder / "artefacts") if p.is_dir()]
        return (*sizes, *(sorted(name for p in places for name in os.listdir(p))))

    def until(self, launcher: subprocess.Popen[str], changes: int, seconds: float) -> None:
        """Wait for so many changes of what the run has written, then a little; or for the end."""
        seen, end = self.written(), time.monotonic() + 120
        while changes and launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.004)
            try:
                now = self.written()
            except OSError:  # removed between looking and asking
                continue
            changes, seen = changes - (now != seen), now
        end = time.monotonic() + seconds
        while launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def kill(self, launcher: subprocess.Popen[str], kind: str, moments: random.Random) -> list[int]:
        """SIGKILL to processes of that kind, or to the next ones up where none has started yet; who was killed."""
        there = self.processes()
        for name in dict.fromkeys((kind.removesuffix("s") if kind == "ranks" else kind, "rank", "agent", "launcher")):
            chosen = sorted(pid for pid, found in there.items() if found == name)
            if chosen:
                break
        victims = chosen if kind == "ranks" else [moments.choice(chosen)] if chosen else []
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return victims

    def gone(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while there := self.processes():
            assert time.monotonic() < end, f"orphans after {seconds} s: {there}"
            time.sleep(0.05)


def _left(folder: Path) -> dict[str, Any]:
    """All that a run leaves, by name: the newest checkpoint's tensors and states, other tensor files, the metrics, the result."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state = read_json(folder / "state.json")["result"]
    return {
        "step": newest.name,
        **compare._state(newest),
        **compare._files(folder),
        "metrics": _shared.values(folder),
        "result": [state[key] for key in ("status", "metrics", "bits")],
    }


def _assert_same(folder: Path, whole: dict[str, Any]) -> None:
    found = compare._in_values(None, _left(folder), whole)
    assert found is None, compare.sentence(found)


@pytest.fixture
def job(request: pytest.FixtureRequest, runs: Path) -> Iterator[Job]:
    made = Job(request.param, runs / "cut")
    yield made
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)


def _uninterrupted(recipe: str, out: Path) -> dict[str, Any]:
    """The same run, whole, in one process."""
    from xutrain.launch.plan import plan
    from xutrain.launch.run import launch
    from xutrain.recipe.load import load

    verb, name = recipe.split("/")
    whole = plan(load(name, verb, RUNS[recipe], smoke=True), out=out, verbosity=-1)
    assert launch(whole)["exit_code"] == 0
    return _left(whole.folder)


def _endure(job: Job, whole: dict[str, Any], moments: random.Random, plan: list[tuple[str, bool]]) -> None:
    """Start and kill, once for every (kind, while it starts) of ``plan``; a run that ends before is looked at and begun anew."""
    plan = list(plan)
    while plan:
        kind, early = plan[0]
        launcher = job.start()
        if early:
            job.until(launcher, 0, moments.uniform(0.2, 6))
        else:
            job.until(launcher, moments.randint(1, 8), moments.uniform(0, 0.1))
        if launcher.poll() is None and (victims := job.kill(launcher, kind, moments)):
            plan.pop(0)
            _, told = launcher.communicate(timeout=120)
            if launcher.pid in victims:
                if moments.random() < 0.5:  # else the next start finds processes that still save
                    job.gone(60)
            else:
                job.gone(60)
                code = launcher.returncode
                assert code in (0, 1) and "Traceback" not in told, (kind, told)
                assert code == 0 or "error:" in told, told
                assert read_json(job.folder / "state.json")["status"] == ("failed" if code else "done")
            for kept in (job.folder / "checkpoints").glob("step-*"):
                assert damage(kept) == "" or job.processes(), f"after {kind}: {kept} {damage(kept)}"
        else:
            _, told = launcher.communicate(timeout=120)
            assert launcher.returncode == 0, told
            job.gone(60)
            _assert_same(job.folder, whole)
            shutil.rmtree(job.folder)
    launcher = job.start()
    _, told = launcher.communicate(timeout=240)
    assert launcher.returncode in (0, 75), told
    while launcher.returncode == 75:  # asked by the processes of a launcher that was killed
        launcher = job.start()
        _, told = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, told
    job.gone(60)
    _assert_same(job.folder, whole)
    assert not [p for p in job.folder.rglob(".*") if p.suffix in (".aside", ".gone", ".before") or p.name.startswith(".run.json.")]


@pytest.mark.parametrize(
    "job",
    [r if r in FIRST else pytest.param(r, marks=pytest.mark.slow) for r in RUNS],
    indirect=True,
    ids=lambda r: r.split("/")[0],
)
def test_each_of_them_is_killed(job: Job, runs: Path, request: pytest.FixtureRequest) -> None:
    """The launcher, and before it a rank, all ranks or torchrun. The verbs that are slow here are killed in ``test_kills.py`` as well."""
    recipe = request.node.callspec.params["job"]
    plan = [(FIRST.get(recipe, "rank"), False), ("launcher", False)]
    _endure(job, _uninterrupted(recipe, runs / "whole"), random.Random(recipe), plan)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("job", list(RUNS), indirect=True, ids=lambda r: r.split("/")[0])
def test_killed_at_twenty_random_moments(job: Job, part: int, runs: Path, request: pytest.FixtureRequest) -> None:
    """Four times five of them: every kind at least once in each, and one while the processes start."""
    recipe = request.node.callspec.params["job"]
    moments = random.Random(f"twenty {recipe} {part}")
    kinds = [*moments.sample(KINDS, len(KINDS)), moments.choice(KINDS)]
    early = moments.randrange(len(kinds))
    _endure(job, _uninterrupted(recipe, runs / "whole"), moments, [(kind, n == early) for n, kind in enumerate(kinds)])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", list(RUNS), indirect=True, ids=lambda r: r.split("/")[0])
def test_asked_to_stop_in_every_way(job: Job, runs: Path, request: pytest.FixtureRequest) -> None:
    """`xutrain runs stop`, TERM, INT, USR2: all processes save at one step boundary, exit code 75, and the run goes on from there."""
    from xutrain.cli.app import run

    recipe = request.node.callspec.params["job"]
    whole = _uninterrupted(recipe, runs / "whole")
    moments = random.Random(f"asked {recipe}")
    for how in ("runs stop", signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        launcher = job.start()
        job.until(launcher, moments.randint(1, 4), 0)
        assert launcher.poll() is None, f"it ended before {how}"
        if isinstance(how, str):
            assert run([*how.split(), str(job.folder)]) == 0
        else:
            launcher.send_signal(how)
        _, told = launcher.communicate(timeout=120)
        state = read_json(job.folder / "state.json")
        assert (launcher.returncode, state["status"]) == (75, "stopped"), told
        assert "stopped after" in " ".join(state["error"]) and "Traceback" not in told, state
        job.gone(60)
    launcher = job.start()
    _, told = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, told
    _assert_same(job.folder, whole)
