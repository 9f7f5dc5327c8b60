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


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method=fr"], "only DSP has delays to choose"),
        (["stages=12", "method.p=null", "method.m=null"], "the network has only 10 layers to cut"),
        (["--longest", "3"], "the smallest staleness of 3 stages is 4"),
        (["--memory-mb", "0"], "must be a number above 0"),
        (["--memory-mb", "0.0001"], "no cut of the network keeps every stage's inputs within it (got 0.0001)"),
        (["--nproc", "2"], "does not divide stages=3"),
    ],
)
def test_plans_that_cannot_be(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pipeline", "plan", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_plan_counts_messages_and_is_no_worse_than_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times replaced by given ones: stages of 1 and 3 ms, messages of 2 ms of a processor at each end and 1 ms between."""
    from xutrain.loops import pipeline_plan
    from xutrain.recipe.load import load

    words = ["stages=2", "method.p=null", "method.m=null", "model.hidden=[16]", "split.cuts=[2]"]
    recipe = load("dsp", "pipeline", words).recipe
    monkeypatch.setattr(pipeline_plan, "message_seconds", lambda bits: (0.005, 0.002))
    monkeypatch.setattr(pipeline_plan, "stage_seconds", lambda job: ([0.001] * 2, [0.003] * 2))
    alone, apart = (pipeline_plan.plan(recipe, processes=n, cores=8)["recipe"] for n in (1, 2))
    assert alone.seconds == pytest.approx(0.008)
    assert apart.forward == pytest.approx([0.003] * 2)
    assert apart.backward == pytest.approx([0.005] * 2)
    assert apart.transfer == pytest.approx(0.001)
    assert apart.seconds >= 0.008
    slow = iter([0.003, 0.009])
    monkeypatch.setattr(pipeline_plan, "stage_seconds", lambda job: ([0.001] * 2, [next(slow)] * 2))
    found = pipeline_plan.plan(recipe, processes=1, cores=8)
    assert found["plan"] == found["recipe"]
