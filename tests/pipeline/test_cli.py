"""`xutrain pipeline plan | schedule | stragglers`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xutrain.cli.app import run


def test_schedule_shows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # draw for once
    picture = tmp_path / "schedule.svg"
    assert run(["pipeline", "schedule", "--batches", "3", "--picture", str(picture)]) == 0
    assert "F2 B0" in capsys.readouterr().out
    assert "<svg" in picture.read_text()
    assert run(["pipeline", "schedule", "method=fr", "--batches", "3", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["delays"]["m"] == [2, 1, 0]
    assert value["stages"][0] == [[0, None], [1, None], [2, 0], [None, 1], [None, 2]]


def test_stragglers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pipeline", "stragglers", "--iterations", "200", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["columns"][1] == "(1,1,0;4,2,0)"
    for row in value["rows"]:
        assert row[1] > row[-1]


def test_plan_gives_a_command_that_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    from xutrain.recipe.load import load

    assert run(["pipeline", "plan", "--config", "dsp", "model.hidden=[16,16,16]", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    words = [w.strip("'") for w in value["command"].split()[6:]]
    recipe = load("dsp", "pipeline", words).recipe
    assert recipe.split.cuts == value["plan"]["cuts"]  # type: ignore[attr-defined]
    assert value["plan"]["seconds_per_batch"] > 0
    assert value["plan"]["delays"]["m"][0] <= 12


def test_plan_refuses_what_has_no_delays(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pipeline", "plan", "method=fr"]) == 2
    assert "only DSP has delays to choose" in capsys.readouterr().err
