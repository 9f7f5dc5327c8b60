"""What may befall a run folder: foreign pickles, damaged checkpoints, a full disk, two launchers. The last good state stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from xutrain.cli.app import run
from xutrain.engine.checkpoint import damage
from xutrain.errors import UsageError
from xutrain.launch.torchrun import processes_lock

OVER = ["train.steps=6", "model.hidden=[64]", "checkpoint.every=2", "eval.every=6", "log.every=1"]


class _Trap:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def _arguments(out: Path) -> list[str]:
    return ["quantize", "--config", "orq", *OVER, "--out", str(out), "--json"]


def _run(out: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    code = run(_arguments(out))
    text = capfd.readouterr()
    return code, json.loads(text.out), text.err


def _stopped(out: Path, capfd: pytest.CaptureFixture[str], step: int = 4) -> Path:
    """A run that was stopped after ``step`` steps, with checkpoints at 2 and 4."""
    assert run([*_arguments(out), "--dry-run"]) == 0
    folder = Path(json.loads(capfd.readouterr().out)["run"])
    folder.mkdir(parents=True)
    (folder / "STOP").write_text(f"{step}")
    assert _run(out, capfd)[0] == 75
    return folder


def _model(folder: Path) -> bytes:
    return (folder / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole")
    assert run(_arguments(out)) == 0
    return _model(next(p.parent for p in out.rglob("run.json")))


def test_a_pickle_is_never_executed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a manifest that fits the pickle as well: refused with exit code 3."""
    import hashlib

    folder = _stopped(tmp_path / "runs", capfd)
    newest = folder / "checkpoints" / "step-000004"
    payload = pickle.dumps(_Trap(tmp_path / "canary"))
    (newest / "shared.pt").write_bytes(payload)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["shared.pt"] = hashlib.sha256(payload).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    code, result, text = _run(tmp_path / "runs", capfd)
    assert code == 3, text
    assert "cannot be loaded as plain weights" in json.dumps(result)
    assert "Traceback" not in text and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("how", ["pickle", "cut", "flipped", "missing", "no manifest", "empty"])
def test_damaged_newest_falls_back(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], whole: bytes) -> None:
    folder = _stopped(tmp_path / "runs", capfd)
    file = folder / "checkpoints" / "step-000004" / "shared.pt"
    content = file.read_bytes()
    if how == "pickle":
        file.write_bytes(pickle.dumps(_Trap(tmp_path / "canary")))
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        file.write_bytes(bytes([*content[:100], content[100] ^ 1, *content[101:]]))
    elif how == "missing":
        file.unlink()
    elif how == "no manifest":
        (file.parent / "manifest.json").unlink()
    else:
        (file.parent / "manifest.json").write_text("")
    code, _, text = _run(tmp_path / "runs", capfd)
    assert code == 0, text
    notes = json.loads((folder / "run.json").read_text())["notes"]
    assert any("step-000004 is damaged" in n and "falling back" in n for n in notes), notes
    assert _model(folder) == whole and not (tmp_path / "canary").exists()


def _limited(out: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    os._exit(run(_arguments(out)))


def test_files_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str], whole: bytes) -> None:
    """A limit below the model's size: exit code 1, the checkpoint before stays, and the same command goes on later."""
    folder = _stopped(tmp_path / "runs", capfd, 2)
    child = multiprocessing.get_context("fork").Process(target=_limited, args=(tmp_path / "runs", 12_000))
    child.start()
    child.join(60)
    text = capfd.readouterr().err
    assert child.exitcode == 1 and "checkpoint could not be written" in text + (folder / "state.json").read_text(), text
    assert "Traceback" not in text
    assert damage(folder / "checkpoints" / "step-000002") == "" and not (folder / "checkpoints" / "step-000004").exists()
    code, _, text = _run(tmp_path / "runs", capfd)
    assert code == 0, text
    assert _model(folder) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 2 MB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(small_disk: Path, capfd: pytest.CaptureFixture[str], whole: bytes) -> None:
    """Nothing can be written at all: exit code 1 with an ``error:`` line; with room again the run goes on and ends the same."""
    folder = _stopped(small_disk, capfd, 2)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
                file.flush()
        except OSError:
            pass
    code = run(_arguments(small_disk))
    text = capfd.readouterr().err
    assert code == 1 and "error:" in text and "Traceback" not in text, text
    assert str(folder) in text or "the file system" in text, text
    assert damage(folder / "checkpoints" / "step-000002") == ""
    filler.unlink()
    code, _, text = _run(small_disk, capfd)
    assert code == 0, text
    assert _model(folder) == whole


def test_two_launchers_on_one_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = _stopped(tmp_path / "runs", capfd)
    with FileLock(str(folder / ".lock"), timeout=0):
        code, result, text = _run(tmp_path / "runs", capfd)
    assert code == 2 and "is being run by another xutrain" in text
    assert result["errors"][0]["hint"]


def test_fresh_never_from_under_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = _stopped(tmp_path / "runs", capfd)
    with FileLock(str(folder / ".lock"), timeout=0):
        assert run([*_arguments(tmp_path / "runs"), "--fresh"]) == 2
    assert "is being run by another xutrain" in capfd.readouterr().err
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_remove_never_from_under_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = _stopped(tmp_path / "runs", capfd)
    with FileLock(str(folder / ".lock"), timeout=0):
        assert run(["runs", "rm", str(folder), "--yes"]) == 2
    assert "is being run by another xutrain" in capfd.readouterr().err and (folder / "run.json").is_file()
    assert run(["runs", "rm", str(folder), "--yes"]) == 0 and not folder.exists()


def test_a_run_that_could_not_say_how_it_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its state still says running; the listing does not, once its process is gone."""
    folder = _stopped(tmp_path / "runs", capfd)
    ended = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    ended.start()
    ended.join()
    for pid, status in ((os.getpid(), "running"), (ended.pid, "killed")):
        (folder / "state.json").write_text(json.dumps({"status": "running", "pid": pid}))
        assert run(["runs", "ls", "--out", str(tmp_path / "runs"), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)[0]["status"] == status


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'5\n{}\n{"step": 1}\n\xff\xfe\x00\n'),
        ("state.json", b"{"),
        ("run.json", b'{"starts": 5, "notes": 5}'),
        ("checkpoints/step-abc/shared.pt", b"x"),
        ("checkpoints/step-000004/manifest.json", b"[]"),
        ("checkpoints/step-000004/manifest.json", b'{"step": 4, "sha256": {}}'),
        ("checkpoints/step-000004/manifest.json", b'{"step": "x", "sha256": {}}'),
    ],
    ids=["metrics", "state", "run", "a folder's name", "no mapping", "no files", "no step"],
)
def test_foreign_content(name: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str], whole: bytes) -> None:
    """What no run wrote is passed over: listed, shown, exported, and the run goes on to the same bytes."""
    folder = _stopped(tmp_path / "runs", capfd)
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content + (file.read_bytes() if name == "metrics.jsonl" else b""))
    for look in (["runs", "ls", "--out", str(tmp_path / "runs")], ["runs", "show", str(folder)], ["export", str(folder), "--to", "csv"]):
        assert run([*look, "--json"]) == 0
        json.loads(capfd.readouterr().out)
    code, _, text = _run(tmp_path / "runs", capfd)
    assert code == 0, text
    assert _model(folder) == whole


def test_processes_of_a_killed_launcher_are_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever inherited the descriptor holds the lock; a new start says that it waits, and gives up with a reason."""
    with processes_lock(tmp_path) as descriptor:
        inherited = os.dup(descriptor)
    try:
        with pytest.raises(UsageError, match="still being run by the processes of an earlier launcher"), processes_lock(tmp_path, 0.3):
            pass
        assert capfd.readouterr().err.count("waiting for them") == 1
    finally:
        os.close(inherited)
    with processes_lock(tmp_path, 0.3):
        assert not capfd.readouterr().err


def test_a_start_that_dies_at_once_is_not_told_as_the_one_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    """A run that was stopped is started again, and its processes are killed before they say that they run."""
    folder = _stopped(tmp_path / "runs", capfd)
    with monkeypatch.context() as patched:
        patched.setattr("xutrain.launch.run._start", lambda plan, lock: -9)
        code, result, _ = _run(tmp_path / "runs", capfd)
    assert (code, result["status"]) == (1, "failed") and "ended with exit code -9" in result["error"][0]
    assert _run(tmp_path / "runs", capfd)[0] == 0 and _model(folder) == whole
