"""What a report says of run folders: the numbers, the verdicts, and what it refuses."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xutrain.cli.app import run
from xutrain.engine.meter import BitMeter
from xutrain.engine.record import Record, read_json, write_json
from xutrain.errors import Failed, UsageError, XutrainError
from xutrain.report import build, claims, overview, page, published, suite
from xutrain.report import runs as runs_module
from xutrain.report.suite import open_table

VALUES = {"fp": [0.9, 0.92], "orq3": [0.8, 0.84]}


def _cell(part: dict[str, Any], row: str) -> dict[str, Any]:
    return next(c for c in part["cells"] if c["row"] == row)


def _paper(content: str, tmp_path: Path) -> published.Paper:
    path = tmp_path / "paper.yaml"
    path.write_text(content, encoding="utf-8")
    return published.Paper("paper", path, published.read(path))


PAPER = """
id: "2002.11082"
title: A paper
tables:
  t1:
    where: Table 1
    source: its text
    suite: mine
    metric: test_accuracy
    scale: {scale}
    tolerance: 0.01
    cells: {{fp: {{digits: {fp}}}, orq3: {{digits: {orq}}}}}
claims:
  order:
    {{text: full is ahead, source: its text, suite: mine, left: {{row: fp}}, op: ">", right: {{row: orq3}}, must_hold: [cpu]}}
  wrong:
    {{text: ORQ is ahead, source: its text, suite: mine, left: {{row: orq3}}, op: ">=", right: {{row: fp}}, must_hold: [cpu]}}
  bits:
    text: as many bits
    source: closed form
    suite: mine
    kind: exact
    left: {{row: fp, metric: bits_up}}
    op: "=="
    right: {{row: orq3, metric: bits_up}}
    must_hold: [cpu]
"""


def _with_paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scale: str = "cpu", fp: float = 0.91, orq: float = 0.82) -> None:
    paper = _paper(PAPER.format(scale=scale, fp=fp, orq=orq), tmp_path)
    monkeypatch.setattr(published, "papers", lambda: [paper])


def test_means_deviations_and_traces(fill: Any, runs: Path) -> None:
    part = build.section(fill(VALUES), runs)
    cell = _cell(part, "orq3")
    assert cell["metrics"]["test_accuracy"]["mean"] == pytest.approx(0.82)
    assert cell["metrics"]["test_accuracy"]["std"] == pytest.approx(0.0282842712)
    assert page.spread(cell["metrics"]["test_accuracy"]) == "0.820 ± 0.028 (2)"
    assert cell["published"] is None and page.paper_number(cell) == "not known"
    assert {"folder", "commit", "recipe_hash"} <= cell["runs"][0].keys() and cell["runs"][0]["recipe_hash"] in cell["runs"][0]["folder"]
    curve, points = part["plots"]
    assert [p["x"] for p in curve["series"][0]["points"]] == [1000.0, 2000.0]
    assert curve["series"][1]["points"][-1]["mean"] == pytest.approx(0.82)
    assert points["kind"] == "points" and len(points["series"][0]["points"]) == 1


def test_verdicts_on_published_numbers(fill: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = fill(VALUES)
    _with_paper(monkeypatch, tmp_path, fp=0.91, orq=0.5)
    part = build.section(table, runs)
    assert _cell(part, "fp")["verdict"] == "match" and _cell(part, "orq3")["verdict"] == "off"
    assert _cell(part, "orq3")["difference"] == pytest.approx(0.32)
    _with_paper(monkeypatch, tmp_path, scale="paper", fp=0.99, orq=0.95)
    assert {c["verdict"] for c in build.section(table, runs)["cells"]} == {"ordering holds"}
    _with_paper(monkeypatch, tmp_path, scale="paper", fp=0.5, orq=0.95)
    assert {c["verdict"] for c in build.section(table, runs)["cells"]} == {"ordering fails"}


def test_one_seed_is_never_a_verdict(fill: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = fill({"fp": [0.9], "orq3": [0.8]})
    _with_paper(monkeypatch, tmp_path)
    part = build.section(table, runs)
    assert {c["verdict"] for c in part["cells"]} == {"one seed"}
    assert _cell(part, "fp")["metrics"]["test_accuracy"]["std"] is None
    verdicts = {c["id"]: c["verdict"] for c in part["claims"]}
    assert verdicts == {"paper.order": "one seed", "paper.wrong": "one seed", "paper.bits": "pass"}
    assert any("paper.order" in f for f in overview.faults([part]))


def test_claims_pass_and_fail(fill: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = fill(VALUES)
    _with_paper(monkeypatch, tmp_path)
    part = build.section(table, runs)
    judged = {c["id"]: c for c in part["claims"]}
    assert [judged[f"paper.{k}"]["verdict"] for k in ("order", "wrong", "bits")] == ["pass", "fail", "pass"]
    numbers = judged["paper.order"]["parts"][0]
    assert numbers["difference"] == pytest.approx(0.09) and numbers["n"] == 2 and numbers["standard_error"] == pytest.approx(0.01)
    assert overview.faults([part]) == ["claim paper.wrong: fail"]


def test_smoke_and_missing(fill: Any, runs: Path, suite_file: Path) -> None:
    part = build.section(fill(VALUES, smoke=True), runs)
    assert {c["verdict"] for c in part["cells"]} == {"smoke only"} and part["smoke"]
    assert {c["verdict"] for c in build.section(open_table(str(suite_file)), runs)["cells"]} == {"missing"}
    assert len(overview.faults([build.section(open_table(str(suite_file)), runs)])) == 2


def test_a_changed_suite_counts_old_cells_as_missing(fill: Any, runs: Path, suite_file: Path) -> None:
    fill(VALUES)
    suite_file.write_text(suite_file.read_text().replace("levels: 3", "levels: 5"), encoding="utf-8")
    part = build.section(open_table(str(suite_file)), runs)
    assert _cell(part, "fp")["n"] == 2 and _cell(part, "orq3")["verdict"] == "missing"
    assert any("orq3/digits" in note for note in part["notes"])


def test_a_claim_on_a_diverged_run(fill: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = fill({"fp": [0.9, 0.91], "orq3": [0.8, 0.81]})
    _with_paper(monkeypatch, tmp_path)
    for folder in (runs / "quantize" / "orq").glob("*/seed*"):
        if "codec: {name: orq" in (folder / "recipe.yaml").read_text() or "name: orq" in (folder / "recipe.yaml").read_text():
            write_json(folder / "state.json", {"status": "diverged", "exit_code": 4})
    part = build.section(table, runs)
    verdicts = {c["id"]: c["verdict"] for c in part["claims"]}
    assert verdicts["paper.order"] == "pass" and verdicts["paper.wrong"] == "fail"
    assert _cell(part, "orq3")["verdict"] == "diverged"
    why = {c["id"]: c["parts"][0]["why"] for c in part["claims"]}
    assert why["paper.order"] == why["paper.wrong"] == "orq3 diverged in 2 of 2 seeds" and why["paper.bits"] == ""
    assert "orq3 diverged in 2 of 2 seeds" in page.html(overview.report("t", [part]))


def test_an_equality_does_not_hold_where_one_side_diverged(fill: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = fill({"fp": [0.9, 0.91], "orq3": [0.9, 0.91]})
    paper = _paper(PAPER.format(scale="cpu", fp=0.9, orq=0.9).replace(", metric: bits_up", ""), tmp_path)
    monkeypatch.setattr(published, "papers", lambda: [paper])
    assert {c["id"]: c["verdict"] for c in build.section(table, runs)["claims"]}["paper.bits"] == "pass"
    for row in ("fp", "orq3"):
        folders = [Path(r["folder"]) for r in _cell(build.section(table, runs), row)["runs"]]
        kept = [(f / "state.json").read_text() for f in folders]
        for folder in folders:
            write_json(folder / "state.json", {"status": "diverged", "exit_code": 4})
        judged = {c["id"]: c for c in build.section(table, runs)["claims"]}["paper.bits"]
        assert judged["verdict"] == "fail" and judged["parts"][0]["why"] == f"{row} diverged in 2 of 2 seeds"
        for folder, text in zip(folders, kept, strict=True):
            (folder / "state.json").write_text(text)


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_a_metric_that_one_seed_never_reaches_is_no_verdict(
    fill: Any, runs: Path, suite_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scale: str
) -> None:
    metric = "reach:test_accuracy:0.85:step"
    suite_file.write_text(suite_file.read_text().replace("metric: test_accuracy", f"metric: {metric}"), encoding="utf-8")
    table = fill({"fp": [0.9, 0.8], "orq3": [0.9, 0.95]})
    paper = _paper(PAPER.format(scale=scale, fp=2.0, orq=3.0).replace("metric: test_accuracy", f"metric: {metric}"), tmp_path)
    monkeypatch.setattr(published, "papers", lambda: [paper])
    cells = build.section(table, runs)["cells"]
    assert [c["metrics"][metric]["n"] for c in cells] == [1, 2]
    assert [c["verdict"] for c in cells] == ["one seed", "off" if scale == "cpu" else ""]


def test_published_numbers_of_a_column_with_a_metric_of_its_own(
    fill: Any, runs: Path, suite_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite_file.write_text(suite_file.read_text().replace("digits: {label: digits,", "digits: {label: digits, metric: test_loss,"))
    table = fill(VALUES)
    _with_paper(monkeypatch, tmp_path)  # says test_accuracy
    assert [c["published"] for c in build.section(table, runs)["cells"]] == [None, None]
    paper = _paper(PAPER.format(scale="cpu", fp=0.09, orq=0.18).replace("metric: test_accuracy", "metric: test_loss"), tmp_path)
    monkeypatch.setattr(published, "papers", lambda: [paper])
    assert [c["verdict"] for c in build.section(table, runs)["cells"]] == ["match", "match"]


@pytest.mark.parametrize("victim", ["metrics.jsonl", "state.json", "recipe.yaml"])
def test_a_number_put_in_by_hand_is_refused_by_name(fill: Any, runs: Path, victim: str) -> None:
    table = fill(VALUES)
    folder = sorted((runs / "quantize" / "orq").glob("*/seed1"))[0]
    path = folder / victim
    if victim == "state.json":
        state = read_json(path)
        state["result"]["metrics"]["test_accuracy"] = 0.999
        write_json(path, state)
    elif victim == "metrics.jsonl":
        path.write_text(path.read_text().replace('"step": 3', '"step": 4'), encoding="utf-8")
    else:
        path.write_text(path.read_text().replace("batch_size: 32", "batch_size: 64"), encoding="utf-8")
    with pytest.raises(Failed) as caught:
        build.section(table, runs)
    assert caught.value.issues[0].where == str(path) and "--fresh" in str(caught.value)


def test_a_plot_over_the_columns(fill: Any, runs: Path, suite_file: Path) -> None:
    one = "  digits: {label: digits, set: {train.steps: 3}}"
    two = "  digits: {label: digits, at: 3, set: {train.steps: 3}}\n  more: {label: more, at: 1, metric: test_loss, set: {train.steps: 4}}"
    text = suite_file.read_text().replace(one, two)
    plot = "plots:\n  - {y: test_accuracy, x: number of steps, kind: columns, log_x: true}\n"
    suite_file.write_text(text.replace("plots:\n", plot), encoding="utf-8")
    part = build.section(fill(VALUES), runs)
    panel = part["plots"][0]
    assert (panel["kind"], panel["x"], panel["title"]) == ("columns", "number of steps", "test accuracy against number of steps")
    full = panel["series"][0]
    assert full["label"] == "full" and full["n"] == 2 and [p["x"] for p in full["points"]] == [1.0, 3.0]
    assert [p["mean"] for p in full["points"]] == pytest.approx([0.09, 0.91]), "the column's own metric where it has one"
    assert page.html(overview.report("t", [part])).count("<svg") == len(part["plots"])
    suite_file.write_text(text.replace("plots:\n", plot).replace("at: 1, ", ""), encoding="utf-8")
    with pytest.raises(XutrainError, match="needs two columns that say where they stand"):
        open_table(str(suite_file))
    suite_file.write_text(text.replace("plots:\n", plot).replace("at: 1, ", "at: 0, "), encoding="utf-8")
    with pytest.raises(XutrainError, match="cannot be logarithmic"):
        open_table(str(suite_file))


def test_several_suites_open_with_one_line_each(
    fill: Any, runs: Path, suite_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = suite_file.with_name("other.yaml")
    other.write_text(suite_file.read_text().replace("title: Mine", "title: Other").replace("levels: 3", "levels: 5"))
    fill(VALUES)
    fill({}, str(other))  # its first cell is the first suite's
    _with_paper(monkeypatch, tmp_path)
    assert run(["report", str(suite_file), str(other), "--runs", str(runs)]) == 0
    text = capsys.readouterr().out
    assert "All suites" in text and text.index("All suites") > text.index("Other")
    folder = runs / "reports" / "mine-other"
    value = json.loads((folder / "report.json").read_text())
    mine, second = value["overview"]
    assert (mine["cells"], mine["done"], mine["claims"], mine["held"], mine["required"], mine["required_held"]) == (2, 2, 3, 2, 3, 2)
    assert mine["verdicts"] == {"match": 2} and mine["faults"] == 1
    assert (second["cells"], second["done"], second["claims"], second["faults"]) == (2, 1, 0, 1)
    assert value["count"]["cells"] == 4 and value["count"]["done"] == 3 and value["count"]["required_held"] == 2
    lines = (folder / "report.md").read_text().splitlines()
    assert "| Mine | 2 of 2 | 2 match | 2 of 3 | – |" in lines and "| Other | 1 of 2 | not known | – | – |" in lines
    html = (folder / "report.html").read_text()
    assert '<a href="#mine">Mine</a>' in html and 'id="mine"' in html and '<a href="#other">Other</a>' in html and 'id="other"' in html


def test_runs_that_disagree_on_their_recipe_are_refused(fill: Any, runs: Path) -> None:
    table = fill(VALUES)
    first, second = sorted((runs / "quantize" / "orq").glob("*"))
    (first / "seed1").rename(first / "aside")
    (second / "seed1").rename(first / "seed1")
    with pytest.raises(UsageError, match="disagree on their recipe"):
        build.section(table, runs)


def test_html_escapes_and_is_one_file(fill: Any, runs: Path, suite_file: Path) -> None:
    suite_file.write_text(suite_file.read_text().replace("title: Mine", "title: '<script>alert(1)</script> & Co'"), encoding="utf-8")
    part = build.section(fill(VALUES), runs)
    report = overview.report(part["title"], [part])
    text = page.html(report)
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Co" in text
    assert text.count("<svg") == 2 and 'src="' not in text and "<link" not in text and "url(http" not in text
    assert "prefers-color-scheme: dark" in text and part["cells"][0]["runs"][0]["recipe_hash"] in text
    assert "currentColor" in text and "#010203" not in text
    identifiers = [piece.split('"')[0] for piece in text.split(' id="')[1:]]
    assert len(identifiers) == len(set(identifiers))


def test_markdown_html_and_json_have_the_same_numbers(fill: Any, runs: Path, suite_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(VALUES)
    assert run(["report", str(suite_file), "--runs", str(runs), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    files = {kind: Path(path) for kind, path in value["files"].items()}
    assert files.keys() == {"md", "html", "json", "picture"} and all(p.exists() for p in files.values())
    for text in ("0.820 ± 0.028 (2)", "0.910 ± 0.014 (2)"):
        assert text in files["md"].read_text() and text in files["html"].read_text()
    assert json.loads(files["json"].read_text())["suites"] == value["suites"]


def test_check_sets_the_exit_code(
    fill: Any, runs: Path, suite_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    fill(VALUES)
    base = ["report", str(suite_file), "--runs", str(runs), "--format", "json"]
    assert run([*base, "--check"]) == 0
    _with_paper(monkeypatch, tmp_path)
    assert run(base) == 0
    assert run([*base, "--check"]) == 5
    assert "claim paper.wrong: fail" in capsys.readouterr().err


def test_run_folders_without_a_suite(fill: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(VALUES)
    assert run(["report", str(runs / "quantize"), "--runs", str(runs), "--format", "md"]) == 0
    text = capsys.readouterr().out
    assert "0.820 ± 0.028" in text and "quantize/orq" in text


def test_report_needs_no_torch() -> None:
    code = (
        "import sys, xutrain.cli.report, xutrain.report.build, xutrain.report.page, xutrain.report.plots; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("op", "gap", "margin", "holds"), [(">=", -0.01, 0.02, True), (">=", 0.01, -0.02, False), ("<", -0.1, 0, True), ("==", 0.01, 0, False)]
)
def test_margins(op: str, gap: float, margin: float, holds: bool) -> None:
    claim = published.Claim.model_validate(
        {
            "text": "",
            "source": "",
            "suite": "x",
            "left": {"row": "a"},
            "op": op,
            "right": {"row": "b"},
            "margin": margin,
            "must_hold": ["cpu"],
        }
    )
    assert claims._holds(claim, gap) is holds


def test_metrics_made_of_curves(fill: Any, runs: Path) -> None:
    part_table = fill(VALUES)
    found = build.runs.read(sorted((runs / "quantize" / "orq").glob("*/seed0"))[0])
    last = found.metrics["test_accuracy"]
    assert claims.value(found, "curve_mean:test_accuracy") == pytest.approx(0.75 * last)
    assert claims.value(found, f"reach:test_accuracy:{0.75 * last}:step") == pytest.approx(2.0)
    assert claims.value(found, f"reach:test_accuracy:{0.75 * last}:bits_up") == pytest.approx(1500.0)
    assert claims.value(found, f"reach:test_accuracy:{0.75 * last}:test_loss") == pytest.approx(1 - 0.75 * last)
    assert claims.value(found, "reach:test_accuracy:2:step") is None and part_table.cells


def test_long_curves_are_measured_whole_and_drawn_thin(tmp_path: Path) -> None:
    """A claim takes every logged value; only pictures are thinned."""
    record = Record(tmp_path, BitMeter())
    values = [1.0 if step == 501 else step / 1000 % 0.5 for step in range(1, 1002)]
    for step, value in enumerate(values, start=1):
        record.log(step, {"x": value})
    record.close()
    found = runs_module.Run(tmp_path, {}, {"status": "done"})
    assert claims.value(found, "curve_mean:x") == pytest.approx(statistics.fmean(values))
    assert claims.value(found, "reach:x:0.9:step") == pytest.approx(500 + 0.9)
    points = build._curve(suite.Plot(y="x", x="step"), [found])
    assert 250 <= len(points) <= 302 and points[-1]["x"] == 1001


def test_pictures_of_a_run_with_several_columns_are_shown_once(fill: Any, runs: Path) -> None:
    fill(VALUES)
    run = build.runs.read(sorted((runs / "quantize" / "orq").glob("*/seed0"))[0])
    (run.folder / "artefacts").mkdir()
    (run.folder / "artefacts" / "overlay.png").write_bytes(b"x")
    cells = [("fedsm", column, "FedSM", column, [run]) for column in ("seen", "unseen")]
    assert [p["caption"] for p in build.pictures.of_cells(cells)] == ["FedSM, seen: overlay (seed 0)"]


def test_pictures_of_runs_are_shown_with_captions(fill: Any, runs: Path) -> None:
    table = fill(VALUES)
    for state in sorted(runs.rglob("state.json")):
        folder = state.parent / "artefacts"
        folder.mkdir()
        (folder / "schedule.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", encoding="utf-8")
        (folder / "table.csv").write_text("a,b\n", encoding="utf-8")
        (folder / "elsewhere.png").symlink_to("/etc/hostname")
    part = build.section(table, runs)
    assert [p["caption"] for p in part["pictures"]] == ["full: schedule (seed 0)", "ORQ-3: schedule (seed 0)"]
    report = overview.report("t", [part])
    files = page.write(report, runs / "reports" / "x", ["md", "html"])
    html = Path(files["html"]).read_text(encoding="utf-8")
    assert html.count('<img loading="lazy" src="data:image/svg+xml;base64,') == 2 and "alert(1)" not in html
    assert html.count("<figcaption>") == html.count("<figure") and "Where these numbers come from" in html
    text = Path(files["md"]).read_text(encoding="utf-8")
    assert "![full: schedule (seed 0)](mine-fp-digits-schedule.svg)" in text
    assert (runs / "reports" / "x" / "mine-fp-digits-schedule.svg").is_file()


def test_every_number_of_the_page_has_its_source_in_the_page(fill: Any, runs: Path) -> None:
    part = build.section(fill(VALUES), runs)
    report = overview.report("t", [part])
    html = page.html(report)
    for cell in part["cells"]:
        for run_ in cell["runs"]:
            assert run_["folder"] in html and run_["recipe_hash"] in html and (run_["commit"][:10] or "not known") in html
