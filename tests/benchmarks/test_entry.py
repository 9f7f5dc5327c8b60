"""The one entry of the benchmarks: medians, aims, and scripts that fail, hang or are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/run.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("run", "results"):
        sys.modules.pop(name, None)
    import importlib

    yield importlib.import_module("run")
    for name in ("run", "results"):
        sys.modules.pop(name, None)


def test_aims(entry: ModuleType) -> None:
    for value, aim, met in (
        (2.0, ">= 2", True),
        (1.9, ">= 2 (peer)", False),
        (0.2, "<= .25", True),
        (1.6, "== 1.6", True),
        (3.0, "", None),
    ):
        assert entry.Ratio("x", value, aim).met is met, aim
    assert entry.Ratio("x", None, ">= 1", "no root").plain() == {"name": "x", "value": None, "aim": ">= 1", "met": None, "why": "no root"}


def test_medians_over_runs(entry: ModuleType) -> None:
    def run(seconds: float, ratio: float) -> dict[str, object]:
        rows = [{"table": "t", "name": "a", "s": seconds}, {"table": "t", "name": "b", "s": None}]
        ratios = [{"name": "r", "value": ratio, "aim": ">= 2", "met": ratio >= 2, "why": "busy"}]
        return {"command": "c", "seconds": 1.0, "title": "T", "rows": rows, "ratios": ratios, "notes": []}

    merged = entry.merged([run(1.0, 1.0), run(3.0, 3.0), {"command": "c", "fault": "exit code 1"}, run(2.0, 2.5)])
    assert merged["rows"][0]["s"] == 2.0 and merged["repeats"] == 3
    assert merged["ratios"][0]["value"] == 2.5 and merged["ratios"][0]["met"] is True and merged["ratios"][0]["spread"] == [1.0, 3.0]
    text = entry.report({"t": merged, "broken": {"command": "b", "fault": "exit code 1", "said": ["oh | no"]}}, False)
    assert "1 of 1 met" in text and "| a | 2 |" in text and "No result: exit code 1" in text and "2.5 (1 to 3)" in text
    missed = entry.report({"t": entry.merged([run(1.0, 1.0)])}, True)
    assert "**no**: busy" in missed and "No number here is to be quoted" in missed


def test_one_anew_keeps_the_others(entry: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"title": "T", "rows": [{"name": "a", "s": 1.0}], "ratios": []}
    (tmp_path / "works.py").write_text(f"import sys; open(sys.argv[-1], 'w').write({json.dumps(json.dumps(result))})")
    monkeypatch.setattr(entry, "HERE", tmp_path)
    monkeypatch.setattr(entry, "SCRIPTS", {"first": entry.Script("works.py"), "second": entry.Script("works.py")})
    out = tmp_path / "R.md"
    for words, count in ((["--only", "second"], 1), (["--add", "--only", "first"], 2), (["--only", "first"], 1)):
        monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *words])
        assert entry.main() == 0
        assert out.read_text().count("## T") == count
        assert list(json.loads(out.with_suffix(".json").read_text())["results"]) == ["first", "second"][:count] or count == 1


def test_results_from_elsewhere_are_not_overwritten(entry: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "RESULTS.md"
    report.write_text("somebody's", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run.py", "--add", "--only", "codecs", "--out", str(report)])
    with pytest.raises(SystemExit):
        entry.main()
    assert report.read_text() == "somebody's"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "not done within 2 s"),
        ("print('nothing')", "wrote no result"),
        ("import sys; open(sys.argv[-1], 'w').write('{\"rows\": []}')", "wrote no result"),
    ],
)
def test_a_script_that_is_not_ready(body: str, says: str, entry: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text(body)
    monkeypatch.setattr(entry, "HERE", tmp_path)
    found = entry.once(entry.Script("bad.py"), False, tmp_path, 2)
    assert says in found["fault"]
    assert entry.once(entry.Script("absent.py"), False, tmp_path, 2)["fault"] == "there is no such script"


def test_every_script_takes_the_flags(entry: ModuleType) -> None:
    for script in entry.SCRIPTS.values():
        text = (FOLDER / script.file).read_text(encoding="utf-8")
        assert "arguments(" in text and "write(" in text, script.file
    assert sum(s.repeats * s.limit_s for s in entry.SCRIPTS.values()) < 3600


def test_peers_are_named() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "peers" / "make.py"), "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown peer nope" in done.stderr
    listed = subprocess.run([sys.executable, str(FOLDER / "peers" / "make.py"), "--list"], capture_output=True, text=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["flower", "llm-compressor", "pfl", "vertimosaic"]


def test_links_without_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model stands alone, and says so."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import laboratory; laboratory.missing = lambda: 'not root'\n"
        "import links; sys.argv[1:] = ['--links', '1gbit', '--ranks', '4', '--elements', '10000', '--json', sys.argv[1]]\nlinks.main()"
    )
    file = tmp_path / "links.json"
    done = subprocess.run([sys.executable, "-c", code, str(FOLDER), str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert "modelled only (not root)" in " ".join(found["notes"]) and all(r["measured s"] is None for r in found["rows"])
