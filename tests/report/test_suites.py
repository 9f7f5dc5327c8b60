"""Suites: strict files, what a sweep would run, and that a killed sweep ends like one that ran through."""

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
from xutrain.errors import RecipeError, XutrainError
from xutrain.launch import sweep
from xutrain.recipe import catalog
from xutrain.report import build, published, suite


@pytest.mark.parametrize(
    ("old", "new", "says", "hint"),
    [
        ("recipe: quantize/orq", "recipe: quantize/orqq", "recipe: no such file", "orq"),
        ("metric:", "metrik:", "metrik: unknown key", "metric"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "gives a seed twice", ""),
        ("seeds: [0, 1]", "seeds: []", "seeds: is empty", ""),
        ("train.steps: 3", "train.stepps: 3", "train.stepps: unknown key", "steps"),
        ("set: {codec: fp}", "set: {codec: fpp}", "codec.name: unknown codec", "fp"),
        ("set: {codec: fp}", "recipe: quantize/fp, sett: {}", "rows.fp.sett: unknown key", "set"),
        ("scales:\n  cpu: {}", "scales: {}", "scales: must be a mapping", ""),
        ("scales:\n  cpu: {}", "scales:\n  cup: {}", "scales: must be a mapping", ""),
        ("better: higher", "better: more", "better: must be one of", ""),
        ("metric: test_accuracy", "metric: test_accuracy\nmetric: a", "given twice", ""),
        ("seeds: [0, 1]", "seeds: [0, 1]\nskip: [fp/nowhere]", "skip: is not a cell", ""),
    ],
)
def test_a_wrong_suite_is_a_named_error(
    suite_file: Path, old: str, new: str, says: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = suite_file.read_text()
    assert old in text
    suite_file.write_text(text.replace(old, new), encoding="utf-8")
    assert run(["sweep", str(suite_file), "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert says in shown and hint in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["sweep", "demmo"], "SUITE: no such suite", "did you mean demo"),
        (["sweep", "demo", "--seeds", "0,0"], "--seeds: gives a seed twice", ""),
        (["sweep", "demo", "--only", "nothing*"], "--only: selects no cell", "rows: fp"),
        (["sweep", "demo", "--scale", "paper"], "--scale: demo has no such scale", "it has cpu"),
        (["sweep", "demo", "--scale", "huge"], "--scale: must be cpu or paper", ""),
        (["report", "demmo"], "SUITE: no such suite", "did you mean demo"),
        (["report", "."], "holds no run folder", "xutrain runs ls"),
        (["report", "demo", "--format", "pdf"], "--format: must be some of", ""),
        (["report", "demo", "."], "mixes suites and run folders", ""),
    ],
)
def test_a_wrong_selection_is_a_named_error(
    suite_file: Path, arguments: list[str], says: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (suite_file.parent / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert says in shown and hint in shown


def test_all_faults_at_once(suite_file: Path) -> None:
    text = suite_file.read_text().replace("codec: fp", "codec: fpp").replace("levels: 3", "levels: 4")
    suite_file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        sweep.prepare(suite.open_table(str(suite_file)), out=Path("runs"))
    assert len(caught.value.issues) == 2


def test_two_recipes_for_one_cell_are_refused(suite_file: Path) -> None:
    text = (
        suite_file.read_text()
        .replace("set: {codec: fp}", "recipe: quantize/fp")
        .replace("label: digits,", "label: digits, recipe: quantize/orq,")
    )
    suite_file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="names a recipe, and so does"):
        suite.open_table(str(suite_file))


def test_finished_cells_are_recalled_and_never_run(fill: Any, runs: Path) -> None:
    table = fill({"fp": [0.9, 0.91], "orq3": [0.8, 0.81]})
    told: list[str] = []
    results, stopped = sweep.carry_out(sweep.prepare(table, out=runs), 2, told.append)
    assert not stopped
    assert [r["metrics"]["test_accuracy"] for r in results] == [0.9, 0.8, 0.91, 0.81]
    assert told == ["4 of 4 runs were finished before"]


def _command(file: Path, runs: Path) -> list[str]:
    return [sys.executable, "-m", "xutrain", "sweep", str(file), "--out", str(runs), "--jobs", "1", "--json"]


def _numbers(file: Path, runs: Path) -> Any:
    """The report without times, commits and places."""
    part = build.section(suite.open_table(str(file)), runs)
    for cell in part["cells"]:
        cell["runs"] = [{k: r[k] for k in ("seed", "status", "recipe_hash")} for r in cell["runs"]]
    return json.loads(json.dumps(part))


def test_a_killed_sweep_goes_on_to_the_same_report(suite_file: Path, tmp_path: Path) -> None:
    suite_file.write_text(
        suite_file.read_text().replace("train.steps: 3", "train.steps: 60, eval.every: 20, checkpoint.every: 5"), encoding="utf-8"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(_command(suite_file, whole), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"done": 4}
    process = subprocess.Popen(_command(suite_file, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("quantize/*/*/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    states = [json.loads(f.read_text())["status"] for f in killed.glob("quantize/*/*/*/state.json")]
    assert states.count("done") < 4
    again = subprocess.run(_command(suite_file, killed), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert _numbers(suite_file, killed) == _numbers(suite_file, whole)


def test_a_run_that_diverged_has_ended(fill: Any, runs: Path, suite_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill({"fp": [0.9, 0.8], "orq3": [0.5]})
    first = next(f for f in runs.rglob("state.json") if "levels: 3" in (f.parent / "recipe.yaml").read_text())
    first.write_text(json.dumps({"status": "diverged", "exit_code": 4}), encoding="utf-8")
    for flags, count in (([], 1), (["--fresh"], 4)):
        assert run(["sweep", str(suite_file), "--out", str(runs), "--dry-run", *flags]) == 0
        assert f"{count} of 4 runs would start" in capsys.readouterr().out


def test_a_request_to_stop_ends_the_sweep_and_not_one_suite_of_it(suite_file: Path, tmp_path: Path) -> None:
    suite_file.write_text(suite_file.read_text().replace("train.steps: 3", "train.steps: 100000, eval.every: 5"), encoding="utf-8")
    second = tmp_path / "second.yaml"
    second.write_text(suite_file.read_text(), encoding="utf-8")
    runs = tmp_path / "runs"
    command = [*_command(suite_file, runs), str(second)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(runs.glob("quantize/*/*/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    (only,) = json.loads(shown)["suites"]
    assert (only["suite"], only["counts"]) == ("mine", {"stopped": 4})


def _tables() -> list[tuple[str, str]]:
    return [(name, scale) for name in suite.files() for scale in suite.SCALES if suite.has_scale(name, scale)]


def test_every_suite_opens_and_every_claim_and_number_has_its_cell() -> None:
    tables = {(n, s): suite.open_table(n, s) for n, s in _tables()}
    assert len(tables) >= 10
    papers = published.papers()
    for paper in papers:
        for key, claim in paper.content.claims.items():
            sides = [s for s in (claim.left, claim.right) if isinstance(s, published.Side)]
            at = [
                t
                for (n, _), t in tables.items()
                if n == claim.suite
                and all(s.row in t.suite.rows and (s.column or next(iter(t.suite.columns))) in t.suite.columns for s in sides)
            ]
            assert at, f"{paper.name}.{key} names no cell of {claim.suite}"
        for key, table in paper.content.tables.items():
            cells = {(c.row, c.column) for t in tables.values() if t.name == table.suite for c in t.cells}
            assert cells >= {(row, column) for row, line in table.cells.items() for column in line}, f"{paper.name}.{key}"
    assert len(suite.groups()) >= 8


def test_every_paper_of_a_suite_has_its_published_file() -> None:
    known = {p.content.id for p in published.papers()}
    for name, scale in _tables():
        assert suite.open_table(name, scale).suite.paper in known, name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), _tables())
def test_every_cell_of_every_suite_validates(name: str, scale: str) -> None:
    for smoke in (False, True):
        assert sweep.prepare(suite.open_table(name, scale, smoke=smoke), out=Path("runs"))


def test_recipes_of_suites_are_of_the_catalogue() -> None:
    for name, scale in _tables():
        for cell in suite.open_table(name, scale).cells:
            try:
                path, verb = catalog.find(cell.recipe)
            except XutrainError as error:
                raise AssertionError(f"{name}: {error}") from error
            assert path.is_file() and verb


def test_card_of_a_method_names_its_suites_and_claims(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "method", "moe_pruner", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert "eq. 9" in card["equation"] and "Wanda" in card["limits"] and "prune/moe_pruner" in card["recipes"]
    assert {"prune_cpu", "moe_pruner_table2", "moe_pruner_table3"} <= {s["suite"] for s in card["suites"]}
    assert "prune-moe-pruner.moe_pruner_below_wanda" in {c["id"] for c in card["claims"]}
    assert run(["show", "codec", "orq"]) == 0
    text = capsys.readouterr().out
    assert "claim: ORQ-3" in text and "suite orq_digits" in text


def test_a_column_with_a_metric_of_its_own(suite_file: Path, fill: Any, runs: Path) -> None:
    text = suite_file.read_text().replace(
        "  digits: {label: digits, set: {train.steps: 3}}",
        "  digits: {label: digits, set: {train.steps: 3}}\n  loss: {label: loss, metric: test_loss, set: {train.steps: 3}}",
    )
    suite_file.write_text(text)
    cells = {(c["row"], c["column"]): c for c in build.section(fill({"fp": [0.9, 0.8], "orq3": [0.7, 0.6]}), runs)["cells"]}
    assert cells["fp", "loss"]["metric"] == "test_loss" and cells["fp", "digits"]["metric"] == "test_accuracy"
    assert cells["fp", "loss"]["runs"][0]["folder"] == cells["fp", "digits"]["runs"][0]["folder"]  # the same run
    suite_file.write_text(text.replace("label: full,", "label: full, metric: test_loss,"))
    with pytest.raises(XutrainError, match="a metric belongs to the suite or to a column"):
        suite.open_table(str(suite_file))


def test_a_sweep_says_about_how_long_it_takes(suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_file.write_text(suite_file.read_text().replace("metric: test_accuracy", "minutes: 8\nmetric: test_accuracy", 1))
    words = ["sweep", str(suite_file), "--out", str(tmp_path / "runs"), "--jobs", "2"]
    assert run(words) == 0
    assert "4 runs to do, about 4 min on 2 free cores" in capsys.readouterr().err
    assert run(words) == 0
    assert "to do" not in capsys.readouterr().err


def test_a_fault_moves_no_finished_run_aside(fill: Any, runs: Path, suite_file: Path) -> None:
    """--fresh with a cell that cannot run: everything stays where it is."""
    table = fill({"fp": [0.9, 0.91], "orq3": [0.8, 0.81]})
    before = sorted(runs.rglob("run.json"))
    suite_file.write_text(suite_file.read_text().replace("levels: 3", "levels: -3"), encoding="utf-8")
    with pytest.raises(RecipeError, match="levels"):
        sweep.prepare(suite.open_table(str(suite_file)), out=runs, fresh=True)
    with pytest.raises(XutrainError, match="--nproc"):
        sweep.prepare(table, out=runs, fresh=True, nproc=3)
    other = suite_file.with_name("right.yaml")
    other.write_text(suite_file.read_text().replace("levels: -3", "levels: 3"), encoding="utf-8")
    assert run(["sweep", str(other), str(suite_file), "--fresh", "--out", str(runs)]) == 2
    assert sorted(runs.rglob("run.json")) == before
    sweep.prepare(table, out=runs, fresh=True)
    assert not any((f.parent.name in ("seed0", "seed1")) for f in runs.rglob("run.json"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seeds: [0, -1]", "seeds: must lie between 0 and"),
        ("metric: test_accuracy", "metric: 'reach:test_accuracy:0.5'", "metric: .*reach:NAME:LEVEL:AXIS"),
        ("show: [test_loss]", "show: ['curve_mean:']", "show: .*curve_mean:NAME"),
    ],
)
def test_seeds_and_metrics_are_checked_before_anything_runs(suite_file: Path, old: str, new: str, message: str) -> None:
    suite_file.write_text(suite_file.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        suite.open_table(str(suite_file))
