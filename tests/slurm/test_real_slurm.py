"""Real recipes under a real SLURM: two nodes, the time limit, preemption, a lost node, cancelled, an array. `make slurm-test`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xutrain.engine.record import read_json, read_metrics
from xutrain.errors import Failed
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


#: padded by sleep to about 70 s on any machine, so that a limit of two minutes warns it in the middle
PACED = ["runtime.unit_ms=130", "checkpoint.every=1000", "eval.every=1000", "log.every=1"]


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPlan, str]:
    """A job with a limit of two minutes, on its own node beside all other tests: the warning takes a minute to come."""
    home = tmp_path_factory.mktemp("limited")
    prepared = plan(load("dsp", "pipeline", PACED, smoke=True), out=home / "runs", launcher="slurm", verbosity=-1)
    profile = _profile(home, "partition: apart\ntime: '2'\nextra_sbatch: [--nodelist=n3]")
    return prepared, slurm.launch([prepared], profile)[0]["job"]


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
    limit = "" if "time:" in text else "time: '10'\n"
    path.write_text(f"{limit}lead_s: 60\n{text}\n")
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
    real.wait_for(lambda: not real.ask("squeue", "-h", "-j", number), 60, "the end of the cancelled job", explain)
    assert real.job(number)["JobState"] == "CANCELLED"
    assert real.job(number)["Restarts"] == "0"
    assert not _processes_of(prepared.folder)


def test_lost_node(cluster: Any, tmp_path: Path, uninterrupted: Path) -> None:
    """A node loses power: nobody gets a signal. The controller finds out and requeues; another node goes on from the last checkpoint."""
    over = ["checkpoint.every=20" if o.startswith("checkpoint") else o for o in LONG]
    (prepared,), (number,) = _submit(tmp_path / "runs", _profile(tmp_path, "partition: apart\nextra_sbatch: [--exclude=n3]"), over=over)
    explain = _explain(cluster, prepared.folder)
    real.wait_for(lambda: _saved(prepared.folder) >= 40, 120, "a checkpoint", explain)
    assert real.job(number)["NodeList"] == "n4"
    cluster.cut_power("n4")
    real.wait_for(lambda: not _processes_of(prepared.folder), 10, "the end of all processes of n4", explain)
    saved = _saved(prepared.folder)
    assert saved < 600
    real.wait_for(lambda: real.job(number).get("Restarts") == "1", 90, "the requeue after the loss of the node", explain)
    real.ask("scontrol", "update", f"JobId={number}", "ExcNodeList=")
    assert real.ask("sinfo", "-h", "-n", "n4", "-p", "apart", "-o", "%T").startswith("down")
    real.wait_for(lambda: real.ended(number), 150, "the end", explain)
    assert (real.job(number)["JobState"], real.job(number)["NodeList"]) == ("COMPLETED", "n3"), explain()
    assert f"resumed from step {saved} of 600" in " ".join(read_json(prepared.folder / "run.json")["notes"])
    assert shared.weights(prepared.folder) == shared.weights(uninterrupted)
    assert shared.values(prepared.folder) == shared.values(uninterrupted)


def test_a_failed_submission_cancels_the_earlier_ones(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third sbatch of three fails; the two jobs that wait already are cancelled."""
    home, sbatch = tmp_path / "bin", shutil.which("sbatch")
    home.mkdir()
    (home / "sbatch").write_text(
        "#!/bin/bash\n"
        f'echo x >>{home}/calls; [ "$(wc -l <{home}/calls)" -lt 3 ] || {{ echo "no more today" >&2; exit 1; }}\nexec {sbatch} "$@"\n'
    )
    (home / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    before = set(real.ask("squeue", "-h", "-o", "%i").split())
    with pytest.raises(Failed, match="no more today"):
        _submit(tmp_path / "runs", _profile(tmp_path, "max_array: 1\nextra_sbatch: [--hold]"), seeds=(0, 1, 2))
    assert set(real.ask("squeue", "-h", "-o", "%i").split()) <= before
    jobs = [read_json(p).get("job") for p in (tmp_path / "runs").rglob("state.json")]
    assert not any(jobs), "no run says that it is queued"


def test_array_of_seeds(cluster: Any, tmp_path: Path) -> None:
    """One at a time, as the cap says."""
    over = ["train.steps=4", "model.hidden=[16]"]
    plans, jobs = _submit(tmp_path / "runs", _profile(tmp_path, "array_cap: 1"), over=over, seeds=(0, 1))
    assert [j.split("_")[1] for j in jobs] == ["0", "1"]
    explain = _explain(cluster, plans[0].folder)
    running: list[int] = []

    def both_done() -> bool:
        running.append(real.ask("squeue", "-h", "-r", "-j", jobs[0].split("_")[0], "-t", "RUNNING", "-o", "%i").count("\n") + 1)
        return all(read_json(p.folder / "state.json").get("status") == "done" for p in plans)

    real.wait_for(both_done, 120, "both seeds", explain)
    assert max(running) == 1
    again = slurm.launch(plans, _profile(tmp_path))
    assert [r["status"] for r in again] == ["done", "done"], "finished runs are not submitted again"


def test_time_limit(cluster: Any, limited: tuple[RunPlan, str], tmp_path: Path) -> None:
    """Warned by SLURM itself before the real limit: the run saves, requeues itself, and ends with the bytes of one without a limit."""
    from xutrain.worker import execute

    prepared, number = limited
    explain = _explain(cluster, prepared.folder)
    whole = plan(load("dsp", "pipeline", ["runtime.unit_ms=0", *PACED[1:]], smoke=True), out=tmp_path / "whole", verbosity=-1)
    whole.write()
    assert execute(whole.folder) == 0
    real.wait_for(lambda: real.job(number).get("Restarts", "0") != "0", 150, "the requeue at the time limit", explain)
    real.wait_for(lambda: real.ended(number), 150, "the end", explain)
    assert real.job(number)["JobState"] == "COMPLETED", explain()
    log = (prepared.folder / "logs" / f"slurm-{number}.out").read_text()
    assert "requeueing" in log, log
    assert "resumed from step" in " ".join(read_json(prepared.folder / "run.json")["notes"])
    assert shared.weights(prepared.folder) == shared.weights(whole.folder)
    assert shared.values(prepared.folder) == shared.values(whole.folder)


def _saved(folder: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("step-*")), default=0)


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
