"""`xutrain export`: a record as CSV, TensorBoard event files and an offline Weights & Biases run."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from xutrain.cli.app import run
from xutrain.report import build

VALUES = {"fp": [0.9, 0.92], "orq3": [0.8, 0.84]}


def _records(runs: Path) -> dict[str, str]:
    kept = ("metrics.jsonl", "state.json", "run.json", "recipe.yaml")
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(runs.rglob("*")) if f.name in kept}


def test_csv_has_every_value_and_changes_nothing(fill: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = fill(VALUES)
    before = _records(runs)
    assert run(["export", str(runs), "--to", "csv", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 4 and all(r["values"] == 4 for r in rows) and _records(runs) == before
    lines = list(csv.DictReader(Path(rows[0]["path"]).read_text(encoding="utf-8").splitlines()))
    assert {r["name"] for r in lines} == {"test_accuracy", "test_loss"} and lines[-1]["step"] == "3"
    assert build.section(table, runs)["cells"][0]["n"] == 2  # the report does not mind the export


def test_tensorboard(fill: Any, runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill(VALUES)
    for _ in range(2):  # again: the earlier export goes
        assert run(["export", str(runs), "--to", "tensorboard", "--out", str(tmp_path / "tb")]) == 0
    folders = sorted((tmp_path / "tb").glob("*/tensorboard"))
    assert len(folders) == 4
    events = EventAccumulator(str(folders[0]))
    events.Reload()
    values = [(e.step, round(e.value, 4)) for e in events.Scalars("test_accuracy")]
    assert [s for s, _ in values] == [1, 3] and values[1][1] == pytest.approx(2 * values[0][1]) and "bits_up" in events.Tags()["scalars"]


def test_wandb_is_offline_by_default(fill: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fill({"fp": [0.9], "orq3": [0.8]})
    first = sorted(f.parent for f in runs.rglob("metrics.jsonl"))[0]
    assert run(["export", str(first), "--to", "wandb", "--out", str(tmp_path / "w")]) == 0
    assert list((tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb"))


def test_what_cannot_be_exported(fill: Any, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(VALUES)
    victim = sorted(runs.rglob("metrics.jsonl"))[0]
    for words, code, text in (
        ([str(runs), "--to", "excel"], 2, "wandb, tensorboard or csv"),
        ([str(tmp_path / "none"), "--to", "csv"], 2, "no such folder"),
        ([str(tmp_path / "mine.yaml"), "--to", "csv"], 2, "holds no run folder"),
        ([str(runs), "--to", "csv", "--online"], 2, "means nothing"),
    ):
        assert run(["export", *words]) == code
        assert text in capsys.readouterr().err
    victim.write_text(victim.read_text().replace("0.9", "0.99", 1))
    assert run(["export", str(runs), "--to", "csv"]) == 1 and str(victim) in capsys.readouterr().err
