"""Job scripts: what they say, and what they do with sbatch, srun and scontrol replaced by small programs of the same name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xutrain.cli.app import run
from xutrain.engine.record import read_json
from xutrain.errors import UsageError
from xutrain.launch import cluster, slurm
from xutrain.launch.plan import plan
from xutrain.recipe.load import load

#: stands for the worker: saves a step every 20 ms until step 500 or until someone writes STOP
WORKER = """
import json, os, pathlib, time
run = pathlib.Path(os.environ["FAKE_RUN"])
state = run / "state.json"
done = max([int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*")], default=0)
started = done
keep = {k: v for k, v in json.loads(state.read_text()).items() if k == "job"}
say = lambda **v: state.write_text(json.dumps({**keep, **v}))
say(status="running")
while done < 500:
    if (run / "STOP").exists() and (done > started or os.environ.get("FAKE_STUCK")):
        say(status="stopped", exit_code=75, error=[])
        raise SystemExit(0)
    if not os.environ.get("FAKE_STUCK"):
        done += 1
        (run / "checkpoints" / f"step-{done:06d}").mkdir(parents=True)
    time.sleep(0.02)
say(status="done", exit_code=0, result={})
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$FAKE_LOG"
exec {python} -c "$FAKE_WORKER"
"""
LOGGED = """#!/usr/bin/env bash
echo "{name} $*" >>"$FAKE_LOG"
{then}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake SLURM commands at the front of PATH; returns the log of their calls."""
    home, log = tmp_path / "bin", tmp_path / "calls.log"
    home.mkdir()
    log.touch()
    count = (
        'n=$(($(grep -c "^sbatch" "$FAKE_LOG") + 100)); [ "$n" -lt "${FAKE_FAIL_AT:-999}" ] || { echo "sbatch: error: no" >&2; exit 1; }'
    )
    texts = {
        "srun": SRUN.format(python=sys.executable),
        "sbatch": LOGGED.format(name="sbatch", then=f"{count}; echo $n"),
        "scontrol": LOGGED.format(name="scontrol", then='echo "JobState=${FAKE_STATE:-RUNNING}"'),
        "scancel": LOGGED.format(name="scancel", then=""),
        "squeue": LOGGED.format(name="squeue", then='echo "${FAKE_QUEUE:-}"'),
    }
    for name, text in texts.items():
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_WORKER", WORKER)
    return log


def _plan(out: Path, nproc: int = 1, seed: int | None = None) -> Any:
    return plan(load("orq", "quantize", smoke=True, seed=seed), out=out, nproc=nproc, launcher="slurm", verbosity=-1)


def _profile(folder: Path, text: str) -> str:
    path = folder / "site.yaml"
    path.write_text(text)
    return str(path)


def _start(script: Path, folder: Path, **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "SLURM_JOB_ID": "101", "FAKE_RUN": str(folder), **env}
    return subprocess.Popen(["bash", str(script)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _saved(folder: Path) -> int:
    return len(list((folder / "checkpoints").glob("step-*")))


def _wait_for(what: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "too slow"
        time.sleep(0.05)


FULL = """
partition: gpu
account: lab
time: "2:00:00"
nodes: 2
gpus_per_node: 4
cpus_per_task: 16
modules: [cuda/12.4]
setup: ["source /opt/site.sh"]
extra_sbatch: ["--constraint=a100"]
lead_s: 300
"""


def test_script_of_many_nodes(tmp_path: Path) -> None:
    text = slurm.script(_plan(tmp_path / "my runs", 4), cluster.open_profile(_profile(tmp_path, FULL))[1])
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --time=2:00:00",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR2@300",
        "#SBATCH --constraint=a100",
        "module load cuda/12.4",
        "source /opt/site.sh",
    ):
        assert f"\n{line}\n" in text, line
    assert '--output="' in text, "a folder with a space"
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=16 --gpus-per-node=4 bash -c" in text
    assert '--nnodes=2 --node-rank="$SLURM_NODEID" --nproc-per-node=2' in text
    directives = [n for n, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    commands = [n for n, line in enumerate(text.splitlines()) if line and not line.startswith("#")]
    assert max(directives) < min(commands), "sbatch reads options only before the first command"
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    ("nproc", "line"), [(1, '"$PYTHON" -m xutrain.worker "$RUN" &'), (2, "--standalone --nproc-per-node=2 -m xutrain.worker")]
)
def test_script_of_one_node(tmp_path: Path, nproc: int, line: str) -> None:
    text = slurm.script(_plan(tmp_path, nproc), cluster.open_profile(None)[1])
    assert line in text and "srun --nodes=1 --ntasks=1" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("partion: gpu", ["partion: unknown key", "did you mean partition", "extra_sbatch", "lead_s"]),
        ("time: forever", ["time: ", "D-H:M:S"]),
        ('time: "2"', ["lead_s: must be less than", "120 s"]),
        ("nodes: 0", ["nodes: must be at least 1"]),
        ('setup: ["a\\nb"]', ["setup", "lines of text"]),
        ("extra_sbatch: [constraint]", ["extra_sbatch", "dash"]),
        ("extra_sbatch: [--array=0-3]", ["--array is set by the job script"]),
        ('modules: ["cuda; rm -r x"]', ["modules", "names of modules"]),
        ('partition: "a b"', ["partition"]),
    ],
)
def test_profiles_are_strict(tmp_path: Path, text: str, says: list[str]) -> None:
    with pytest.raises(UsageError) as told:
        cluster.open_profile(_profile(tmp_path, text))
    assert all(s in str(told.value) for s in says), str(told.value)


@pytest.mark.parametrize(("text", "seconds"), [("30", 1800), ("30:10", 1810), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400)])
def test_times(text: str, seconds: int) -> None:
    assert cluster.Profile(time=text).time_s == seconds


def test_shipped_profiles_are_right() -> None:
    assert {"generic", "two_gpu_nodes"} <= set(cluster.names())
    for name in cluster.names():
        assert cluster.open_profile(name)[1].summary


def test_without_slurm(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["quantize", "--config", "orq", "--smoke", "--launcher", "slurm", "--out", str(tmp_path / "runs")]
    assert run(arguments) == 2
    assert "slurm needs `sbatch`" in capfd.readouterr().err
    assert run([*arguments, "--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("#!/usr/bin/env bash\n")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("run.json"))


def test_submit_one(capfd: pytest.CaptureFixture[str], tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["quantize", "--config", "orq", "--smoke", "--launcher", "slurm", "--out", str(tmp_path / "runs"), "--json"]
    assert run(arguments) == 0
    row = json.loads(capfd.readouterr().out)
    folder = Path(row["run"])
    assert (row["status"], row["job"]) == ("submitted", "101")
    assert Path(row["script"]) == folder / "job.sbatch" and (folder / "recipe.yaml").is_file()
    assert json.loads((folder / "state.json").read_text())["status"] == "queued"
    assert fake.read_text() == f"sbatch --parsable {folder.resolve()}/job.sbatch\n"
    monkeypatch.setenv("FAKE_QUEUE", "PENDING")
    assert run(arguments) == 2
    assert "in the queue already, as job 101" in capfd.readouterr().err


def test_seeds_are_one_array(capfd: pytest.CaptureFixture[str], tmp_path: Path, fake: Path) -> None:
    arguments = [
        "quantize",
        "--config",
        "orq",
        "--smoke",
        "--launcher",
        "slurm",
        "--out",
        str(tmp_path / "runs"),
        "--json",
        "--seeds",
        "3,1,2",
    ]
    arguments += ["--cluster", _profile(tmp_path, "array_cap: 2")]
    assert run(arguments) == 0
    rows = json.loads(capfd.readouterr().out)["runs"]
    assert [r["job"] for r in rows] == ["101_0", "101_1", "101_2"]
    array = Path(fake.read_text().split()[-1])
    assert "#SBATCH --array=0-2%2\n" in array.read_text()
    listed = (array.parent / "runs.txt").read_text().splitlines()
    assert listed == [str(Path(r["run"]).resolve()) for r in rows]
    assert all((Path(p) / "job.sbatch").is_file() for p in listed), "each run can be submitted alone as well"
    job = _start(
        array,
        Path(listed[1]),
        SLURM_ARRAY_JOB_ID="101",
        SLURM_ARRAY_TASK_ID="1",
        SLURM_JOB_ID="103",
        FAKE_WORKER=WORKER.replace("500", "3"),
    )
    assert job.wait(60) == 0
    assert _saved(Path(listed[1])) == 3 and _saved(Path(listed[0])) == 0
    assert json.loads((Path(listed[1]) / "state.json").read_text())["job"]["id"] == "101_1"


def test_failed_submission_cancels_the_others(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "103")
    arguments = ["quantize", "--config", "orq", "--smoke", "--launcher", "slurm", "--out", str(tmp_path / "runs"), "--seeds", "0,1,2,3"]
    assert run([*arguments, "--cluster", _profile(tmp_path, "max_array: 1")]) == 1
    assert "sbatch: sbatch: error: no" in capfd.readouterr().err
    assert sorted(line for line in fake.read_text().splitlines() if line.startswith("scancel")) == ["scancel 101", "scancel 102"]


def test_warned_saves_and_requeues(tmp_path: Path, fake: Path) -> None:
    """USR2, twice and close together, as SLURM and a person might send it; then the requeued start goes on to the end."""
    prepared = _plan(tmp_path)
    slurm.launch([prepared], None)
    folder = prepared.folder
    job = _start(folder / "job.sbatch", folder)
    _wait_for(lambda: _saved(folder) > 2)
    job.send_signal(signal.SIGUSR2)
    time.sleep(0.01)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(60) == 75
    assert "requeueing" in job.stdout.read()  # type: ignore[union-attr]
    assert "scontrol requeue 101\n" in fake.read_text()
    assert (folder / "STOP").read_text().startswith("slurm:")
    again = _start(folder / "job.sbatch", folder, SLURM_RESTART_COUNT="1", FAKE_WORKER=WORKER.replace("500", "10"))
    assert again.wait(60) == 0
    assert json.loads((folder / "state.json").read_text())["status"] == "done" and not (folder / "STOP").exists()
    assert [s["job"]["restarts"] for s in json.loads((folder / "run.json").read_text())["job_starts"]] == [0, 1]
    over = _start(folder / "job.sbatch", folder)
    assert over.wait(60) == 0 and "was finished before" in over.stdout.read()  # type: ignore[union-attr]


def test_no_endless_requeue(tmp_path: Path, fake: Path) -> None:
    """A start that saved nothing new, and one too many, are not requeued; nor is a run that a person stopped."""
    prepared = _plan(tmp_path)
    slurm.launch([prepared], None)
    folder = prepared.folder
    stuck = _start(folder / "job.sbatch", folder, FAKE_STUCK="1")
    _wait_for(lambda: read_json(folder / "state.json").get("status") == "running")
    stuck.send_signal(signal.SIGUSR2)
    assert stuck.wait(60) == 75 and "no step was saved" in stuck.stdout.read()  # type: ignore[union-attr]
    often = _start(folder / "job.sbatch", folder, SLURM_RESTART_COUNT="20")
    _wait_for(lambda: _saved(folder) > 2)
    often.send_signal(signal.SIGUSR2)
    assert often.wait(60) == 75 and "requeued 20 times" in often.stdout.read()  # type: ignore[union-attr]
    person = _start(folder / "job.sbatch", folder)
    before = _saved(folder)
    _wait_for(lambda: _saved(folder) > before)
    (folder / "STOP").touch()
    assert person.wait(60) == 75
    cancelled = _start(folder / "job.sbatch", folder, FAKE_STATE="CANCELLED")
    before = _saved(folder)
    _wait_for(lambda: _saved(folder) > before)
    cancelled.send_signal(signal.SIGTERM)
    assert cancelled.wait(60) == 75
    assert "scontrol requeue" not in fake.read_text()
    preempted = _start(folder / "job.sbatch", folder)
    before = _saved(folder)
    _wait_for(lambda: _saved(folder) > before)
    preempted.send_signal(signal.SIGTERM)
    assert preempted.wait(60) == 75
    assert fake.read_text().count("scontrol requeue") == 1


def test_stop_left_by_a_killed_job(tmp_path: Path, fake: Path) -> None:
    """The warning came, the node died before the save: the next start must not obey the old STOP; a person's STOP it must."""
    prepared = _plan(tmp_path)
    slurm.launch([prepared], None)
    (prepared.folder / "STOP").write_text("slurm: job 100 was warned\n")
    job = _start(prepared.folder / "job.sbatch", prepared.folder, FAKE_WORKER=WORKER.replace("500", "5"))
    assert job.wait(60) == 0 and _saved(prepared.folder) == 5


def test_two_jobs_on_one_folder(tmp_path: Path, fake: Path) -> None:
    prepared = _plan(tmp_path)
    slurm.launch([prepared], None)
    folder = prepared.folder
    first = _start(folder / "job.sbatch", folder)
    _wait_for(lambda: _saved(folder) > 0)
    second = _start(folder / "job.sbatch", folder)
    assert second.wait(60) == 2 and "is being run by another xutrain" in second.stdout.read()  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="is being run by another"):
        slurm.launch([prepared], None)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["quantize", "--config", "orq", "data.name=cifar10", "model.name=resnet_cifar"],
            ["data set cifar10", "xutrain data prepare cifar10"],
        ),
        (
            ["pretrain", "--config", "dsm", "data={name: tokens, prepared: openwebtext}"],
            ["data set openwebtext", "xutrain data prepare openwebtext --source PATH"],
        ),
        (["pretrain", "--config", "dsm", "data.tokenizer=gpt2"], ["xutrain data prepare gpt2_bpe"]),
        (["prune", "--config", "moe_pruner", "model.path=/no/Mixtral"], ["model.path: no such file or folder", "/no/Mixtral"]),
    ],
    ids=["set", "prepared", "tokenizer", "model"],
)
def test_missing_data_is_told_before_submission(
    arguments: list[str], says: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, the command that makes it, and nothing submitted; a profile may say that only the nodes have the data."""
    monkeypatch.setenv("XUTRAIN_DATA", str(tmp_path / "data"))
    line = [*arguments, "--launcher", "slurm", "--out", str(tmp_path / "runs")]
    assert run(line) == 3
    told = " ".join(capfd.readouterr().err.split())
    assert all(s in told for s in says) and "data_on_nodes: true" in told, told
    assert not fake.read_text() and not (tmp_path / "runs").exists()
    assert run([*line, "--cluster", _profile(tmp_path, "data_on_nodes: true")]) == 0
    assert fake.read_text().startswith("sbatch --parsable")


def test_no_recipe_that_needs_nothing_is_refused() -> None:
    """Every recipe's smoke size runs on embedded or generated data."""
    from xutrain.launch.needs import missing
    from xutrain.recipe import catalog

    for entry in catalog.listing():
        loaded = load(entry.name, entry.verb, smoke=True)
        assert not missing(loaded.recipe), (entry, missing(loaded.recipe))
