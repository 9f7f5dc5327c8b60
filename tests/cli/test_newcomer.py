"""A newcomer's mistakes: exit code 2 (or 3), one `error:` line that names the place, a hint that helps, no stack trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xutrain.cli.app import run

RECIPE = """
extends: base/digits.yaml
workers: 4
train: {{steps: 2}}
codec: {{name: orq, levels: 3}}
{extra}
"""


def _recipe(folder: Path, extra: str = "", name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(RECIPE.format(extra=extra), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["quantise"], "No such command", "quantize"),
        (["quantize", "--confg", "orq"], "No such option", "--config"),
        (["quantize"], "--config: is missing", "xutrain ls recipes"),
        (["quantize", "--config", "orqq"], "no recipe of that name", "did you mean orq"),
        (["quantize", "--config", "nowhere/else.yaml"], "no such file", "xutrain ls recipes"),
        (["quantize", "--config", "orq", "trian.epochs=3"], "trian: unknown key", "train"),
        (["quantize", "--config", "orq", "train.epoch=3"], "train.epoch: unknown key", "epochs"),
        (["quantize", "--config", "orq", "method=sdg"], "method.name: unknown method", "sgd"),
        (["quantize", "--config", "orq", "codec=oqr"], "codec.name: unknown codec", "orq"),
        (["quantize", "--config", "orq", "codec.level=3"], "codec.level: unknown key", "levels"),
        (["quantize", "--config", "orq", "codec.levels=4"], "codec.levels", "3, 5, 9"),
        (["quantize", "--config", "orq", "train.steps=many"], "train.steps: must be a whole number", "number"),
        (["quantize", "--config", "orq", "train.steps=true"], "train.steps: must be a whole number", ""),
        (["quantize", "--config", "orq", "train.steps=1.5"], "train.steps: must be a whole number", ""),
        (["quantize", "--config", "orq", "optimizer.lr=-1"], "optimizer.lr: must be greater than 0", ""),
        (["quantize", "--config", "orq", "optimizer.lr=.inf"], "not finite", ""),
        (["quantize", "--config", "orq", "train"], "override", "KEY=VALUE"),
        (["quantize", "--config", "orq", "schedule.milestones=[0.5,0.2]"], "schedule.milestones", "0.75"),
        (["quantize", "--config", "orq", "schedule.milestones.0=1"], "is not a mapping", "replace it whole"),
        (["quantize", "--config", "orq", "--nproc", "3"], "--nproc: does not divide workers=4", "1, 2, 4"),
        (["quantize", "--config", "orq", "--seeds", "0,0"], "--seeds: gives a seed twice", ""),
        (["quantize", "--config", "orq", "--seeds", "a"], "--seeds: must be whole numbers", "0,1,2"),
        (["quantize", "--config", "orq", "--launcher", "ssh"], "--launcher: must be", ""),
        (["quantize", "--config", "orq", "train.batch_size=100000"], "train.batch_size", "lower"),
        (["quantize", "--config", "orq", "exchange.reduction=ring"], "exchange.reduction", "exact"),
        (["quantize", "--config", "orq", "plugins=[no_such_module_here]"], "plugins: cannot import", "install"),
        (["ls", "codexs"], "ls: must be one of", "codecs"),
        (["show", "codec", "orqq"], "unknown codec", "orq"),
        (["runs", "show", "nowhere"], "is not a run folder", "xutrain runs ls"),
    ],
)
def test_mistakes(arguments: list[str], says: str, hint: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if arguments[0] == "quantize" and "--config" in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    code = run(arguments)
    captured = capfd.readouterr()
    text = " ".join(captured.err.replace("│", " ").split())
    assert code == 2, text
    assert says in text
    assert hint in text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("workers: 2", "given twice, on lines"),
        ("a: &x 1", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("seed: 1e999", "not finite"),
        ("seed: [1", "error:"),
        ("1: 2", "is not a word"),
        ("model: {name: mlp, hidden: 3}", "model.hidden: must be a list"),
        ("data: 5", "data.name"),
        ("smoke: 3", "smoke: must be a mapping"),
        ("seed: 2147483648", "seed: must be less than"),
        ("verb: federate", "is a recipe of `federate`"),
        ("verb: training", "verb: must be one of"),
        ("method: {name: [sgd]}", "unknown method"),
        ("x: " + "[" * 3000, "error:"),
    ],
)
def test_recipes_that_cannot_be_right(extra: str, says: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = run(["quantize", "--config", _recipe(tmp_path, extra), "--out", str(tmp_path / "runs")])
    text = " ".join(capfd.readouterr().err.split())
    assert code == 2
    assert says in text
    assert text.count("error:") >= 1 and "Traceback" not in text


def test_all_errors_at_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["quantize", "--config", "orq", "codec=oqr", "train.steps=x", "optimizer.lrr=1", "--json"]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("error:") == 3
    assert [e["where"] for e in json.loads(captured.out)["errors"]] == ["codec.name", "train.steps", "optimizer.lrr"]


def test_not_utf8_and_not_a_recipe(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"summary: \xff\xfe")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "empty.yaml").write_text("")
    for name in ("latin", "list", "empty"):
        assert run(["quantize", "--config", str(tmp_path / f"{name}.yaml")]) == 2
    assert capfd.readouterr().err.count("error:") == 3


def test_extends_nothing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: base/digitz.yaml\n")
    assert run(["quantize", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "no such recipe" in capfd.readouterr().err


def test_extends_in_a_circle(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert run(["quantize", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "goes in a circle" in capfd.readouterr().err


def test_numbers_as_people_write_them(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``1e-3`` is a number and ``1e1`` a whole one, in files and in overrides."""
    path = _recipe(tmp_path, "optimizer: {lr: 1e-3, weight_decay: 0}\neval: {every: 1e1}")
    assert run(["quantize", "--config", path, "--dry-run", "--json", "train.steps=1e1"]) == 0
    resolved = json.loads(capfd.readouterr().out)["resolved"]
    assert resolved["optimizer"]["lr"] == 0.001
    assert resolved["train"]["steps"] == 10


def test_recipe_of_another_verb(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _recipe(tmp_path, "verb: quantize")
    assert run(["pretrain", "--config", path]) == 2
    assert "error:" in capfd.readouterr().err
