"""`xutrain doctor` and `xutrain diff --run`: what they say where all is well, and where something was broken on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xutrain.cli.app import run
from xutrain.launch import compare

OVER = ["train.steps=4", "model.hidden=[8]"]


def test_checks(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code = run(["doctor", "--json", "--out", str(tmp_path / "runs")])
    value = json.loads(capfd.readouterr().out)
    seen = {c["check"]: c for c in value["checks"]}
    assert {"versions", "devices", "gloo", "rename", "lock", "disk", "data", "wandb", "slurm"} <= set(seen)
    assert all(seen[n]["status"] == "ok" for n in ("versions", "gloo", "rename", "lock")), value
    assert "ping" in seen["gloo"]["value"] and seen["slurm"]["status"] == "skip"
    assert code == (1 if value["status"] == "fail" else 0)
    assert not list((tmp_path / "runs").iterdir()), "nothing is left behind"


def test_a_folder_that_cannot_be_written(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(["doctor", "--json", "--out", str(tmp_path / "file" / "runs")]) == 1
    seen = {c["check"]: c for c in json.loads(capfd.readouterr().out)["checks"]}
    assert seen["runs folder"]["status"] == "fail" and seen["runs folder"]["hint"]


def test_same_runs_are_equal_and_others_part(tmp_path: Path) -> None:
    folders = [
        compare.traced("orq", "quantize", [*OVER, *more], steps=3, out=tmp_path / str(i), smoke=False)
        for i, more in enumerate(([], [], ["optimizer.lr=0.0500001"]))
    ]
    assert compare.compared(folders[0], folders[1]) == 3
    assert compare.first_difference(folders[0], folders[1]) is None
    found = compare.first_difference(folders[0], folders[2])
    assert found is not None and found["step"] == 1 and found["tensor"].startswith("model "), found
    assert "they part at step 1, model " in compare.sentence(found)


def test_one_changed_bit_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folders = [compare.traced("orq", "quantize", OVER, steps=3, out=tmp_path / str(i), smoke=False) for i in range(2)]
    path = folders[1] / "checkpoints" / "step-000002" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[1] += 1e-7
    save_file(tensors, path)
    found = compare.first_difference(*folders)
    assert found is not None and (found["step"], found["tensor"], found["index"]) == (2, f"model {name}", 1)


def test_diff_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "orq", "orq3", "--run", "2", "--smoke", "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert value["status"] == "different" and value["difference"]["step"] == 1
    assert run(["diff", "orq", "orq", "--run", "2", "--smoke"]) == 0
    assert "bit-equal" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["doctor", "train.steps=1"], "is for --parity"),
        (["doctor", "--parity", "orqq"], "no recipe of that name"),
        (["doctor", "--parity", "quantize/orq", "workers=1"], "one participant"),
        (["doctor", "--parity", "quantize/orq", "--nproc", "3"], "does not divide"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert says in " ".join(capfd.readouterr().err.split())


def test_parity_through_the_launcher(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--parity", "quantize/orq", "--steps", "3", "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert (value["status"], value["nproc"], value["steps"]) == ("equal", [1, 2], 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["sparsify/def", "federate/domo", "federate/fedsm", "pipeline/dsp", "vertical/afsgd", "prune/distill", "pretrain/dsm"]
)
def test_parity_of_every_verb(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--parity", recipe, "--steps", "3", "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert value["status"] == "equal" and value["nproc"][1] > 1 and value["steps"] > 0


def test_diff_of_keys(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "federate/domo", "federate/fedavg"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "method.server_momentum 0.9 (no such key)" in told and "method.name domo fedavg" in told
    assert run(["diff", "federate/domo", "federate/domo"]) == 0
    assert capfd.readouterr().out == "no key differs\n"


def test_runs_without_checkpoints_are_compared_by_their_files(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "prune/random", "prune/wanda", "--run", "2", "--smoke"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "no saved steps, so by the files and metrics that both left" in told and "they part at " in told, told
