"""Real recipes under a real SLURM: two nodes, warned, requeued, preempted, cancelled, an array. `make slurm-test`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xutrain.engine.record import read_json, read_metrics
from xutrain.launch import slurm
from xutrain.launch.plan import RunPlan, plan
from xutrain.recipe.load import load

pytestmark = pytest.mark.slurm


def _beside(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


real = _beside("real_cluster", Path(__file__).with_name("real_cluster.py"))
shared = _beside("shared_conftest", Path(__file__).parents[1] / "conftest.py")

#: long enough that a signal meets it in the middle
LONG = ["train.steps=600", "checkpoint.every=300", "eval.every=600", "log.every=10", "model.hidden=[16]"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    reason = real.missing()
    if reason:
        pytest.skip(f"no real SLURM here: {reason}")
    home = tmp_path_factory.mktemp("slurm")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(real.cluster(home))
        except (AssertionError, OSError) as error:  # none of our code is running yet
            pytest.skip(f"no real SLURM here: it does not start: {error}")
        yield running


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whole, in one process of this machine."""
    from xutrain.worker import execute

    prepared = plan(load("orq", "quantize", LONG), out=tmp_path_factory.mktemp("whole"), verbosity=-1)
    prepared.write()
    assert execute(prepared.folder) == 0
    return prepared.folder


def _profile(folder: Path, text: str = "") -> str:
    path = folder / "site.yaml"
    path.write_text(f"time: '10'\nlead_s: 60\n{text}\n")
    return str(path)


def _submit(
    out: Path, profile: str, nproc: int = 1, over: list[str] = LONG, seeds: tuple[int, ...] = (0,)
) -> tuple[list[RunPlan], list[str]]:
    plans = [plan(load("orq", "quantize", over, seed=s), out=out, nproc=nproc, launcher="slurm", verbosity=-1) for s in seeds]
    return plans, [row["job"] for row in slurm.launch(plans, profile)]


def _step(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder)), default=0)


def _explain(cluster: Any, folder: Path) -> Callable[[], str]:
    def text() -> str:
        logs = [p.read_text(errors="replace")[-3000:] for p in (folder / "logs").glob("slurm-*.out")]
        return "\n".join([*logs, json.dumps(read_json(folder / "state.json")), cluster.logs()])

    return text


def test_two_nodes_warned_and_requeued(cluster: Any, tmp_path: Path, uninterrupted: Path) -> None:
    """Two srun tasks of torchrun; the warning arrives, all ranks save, the job requeues itself and ends with the same bytes."""
    (prepared,), (number,) = _submit(tmp_path / "runs", _profile(tmp_path, "nodes: 2\ncpus_per_task: 1"), nproc=2)
    explain = _explain(cluster, prepared.folder)
    real.wait_for(lambda: _step(prepared.folder) >= 20, 120, "20 steps", explain)
    assert real.job(number)["NumNodes"] == "2"
    real.ask("scancel", "--signal=USR2", "--batch", number)
    real.wait_for(lambda: real.ended(number), 150, "the end", explain)
    assert (real.job(number)["JobState"], real.job(number)["Restarts"]) == ("COMPLETED", "1"), explain()
    log = (prepared.folder / "logs" / f"slurm-{number}.out").read_text()
    assert "requeueing" in log, log
    assert [s["job"]["restarts"] for s in read_json(prepared.folder / "run.json")["job_starts"]] == [0, 1]
    assert read_json(prepared.folder / "state.json")["status"] == "done"
    assert shared.weights(prepared.folder) == shared.weights(uninterrupted)
    assert shared.values(prepared.folder) == shared.values(uninterrupted)


def test_preempted_goes_on_and_cancelled_does_not(cluster: Any, tmp_path: Path, uninterrupted: Path) -> None:
    """A job of higher priority takes both nodes; SLURM requeues ours, which goes on. scancel is not followed by a requeue."""
    (prepared,), (number,) = _submit(tmp_path / "runs", _profile(tmp_path, "partition: low"))
    explain = _explain(cluster, prepared.folder)
    real.wait_for(lambda: _step(prepared.folder) >= 20, 120, "20 steps", explain)
    urgent = real.ask("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", f"--output={tmp_path}/urgent.out", "--wrap", "sleep 1")
    real.wait_for(lambda: real.job(number)["JobState"] != "RUNNING", 60, "the preemption", explain)
    at = _step(prepared.folder)
    assert 20 <= at < 600
    real.wait_for(lambda: real.ended(urgent), 60, "the urgent job", explain)
    real.wait_for(lambda: real.ended(number), 150, "the end", explain)
    assert (real.job(number)["JobState"], real.job(number)["Restarts"]) == ("COMPLETED", "1"), explain()
    assert shared.weights(prepared.folder) == shared.weights(uninterrupted)

    over = [*LONG[1:], "train.steps=100000"]
    (prepared,), (number,) = _submit(tmp_path / "cancelled", _profile(tmp_path), over=over)
    explain = _explain(cluster, prepared.folder)
    real.wait_for(lambda: _step(prepared.folder) >= 20, 120, "20 steps", explain)
    real.ask("scancel", number)
    real.wait_for(lambda: not real.ask("squeue", "-h"), 60, "an empty queue", explain)
    assert real.job(number)["JobState"] == "CANCELLED"
    assert real.job(number)["Restarts"] == "0"
    assert not _processes_of(prepared.folder)


def test_array_of_seeds(cluster: Any, tmp_path: Path) -> None:
    over = ["train.steps=4", "model.hidden=[16]"]
    plans, jobs = _submit(tmp_path / "runs", _profile(tmp_path, "array_cap: 2"), over=over, seeds=(0, 1))
    assert [j.split("_")[1] for j in jobs] == ["0", "1"]
    explain = _explain(cluster, plans[0].folder)
    done = lambda p: read_json(p.folder / "state.json").get("status") == "done"  # noqa: E731
    real.wait_for(lambda: all(done(p) for p in plans), 120, "both seeds", explain)
    again = slurm.launch(plans, _profile(tmp_path))
    assert [r["status"] for r in again] == ["done", "done"], "finished runs are not submitted again"


def _processes_of(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found
