"""A report as Markdown, as one self-contained HTML page and as JSON. All three print the numbers of ``build``."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from xutrain.report import plots
from xutrain.report.pictures import inline

MARKS = {"match": "✓", "ordering holds": "✓", "pass": "✓", "off": "✗", "ordering fails": "✗", "fail": "✗", "failed": "✗", "diverged": "✗"}


def number(value: float | None, decimals: int | None = None) -> str:
    """A number in four significant digits, or with ``decimals``; large ones with a thousands' mark."""
    if value is None:
        return "–"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def spread(value: dict[str, Any] | None, count: bool = True) -> str:
    """``0.9667 ± 0.0055 (3)``: mean, sample deviation to two digits, number of seeds. One seed has no deviation."""
    if value is None:
        return "–"
    std, n = value["std"], f" ({value['n']})" if count else ""
    if not std or not math.isfinite(std):
        return f"{number(value['mean'])}{n}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    if abs(value["mean"]) < 1e-3 and decimals > 4:
        return f"{value['mean']:.2e} ± {std:.1e}{n}"
    if decimals > 7 or abs(value["mean"]) >= 1e6:
        return f"{number(value['mean'])} ± {std:.1e}{n}"
    return f"{number(value['mean'], decimals)} ± {std:.{decimals}f}{n}"


def paper_number(cell: dict[str, Any]) -> str:
    said = cell["published"]
    if said is None:
        return "not known"
    return number(said["value"]) + (f" ± {said['std']:.2g}" if said["std"] is not None else "")


def error(value: float) -> str:
    """A standard error in two digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}"


def words(name: str) -> str:
    """A metric's name as a reader says it."""
    kind, colon, rest = name.partition(":")
    if colon and kind == "curve_mean":
        return f"{rest.replace('_', ' ')}, mean over the run"
    if colon and kind == "reach":
        metric, level, axis = rest.replace("_", " ").split(":")
        return f"{axis} to {metric} {level}"
    return name.replace("_", " ")


def verdict(text: str) -> str:
    return f"{MARKS[text]} {text}" if text in MARKS else text or "–"


#: verdicts that compare with the paper
BESIDE = ("match", "off", "ordering holds", "ordering fails", "smoke only")
#: heads of the table of all suites, after its first column
OVERVIEW = ("cells finished", "beside the paper", "claims that must hold", "other claims")


def overview(known: dict[str, Any]) -> list[str]:
    """A suite's line under those heads: ``34 of 36, 2 diverged``, ``12 ordering holds``, ``5 of 5``, ``1 of 2``."""
    finished = f"{known['done']} of {known['cells']}" + (f", {known['diverged']} diverged" if known["diverged"] else "")
    beside = {text: n for text, n in known["verdicts"].items() if text in BESIDE}
    verdicts = ", ".join(f"{n} {text}" for text, n in sorted(beside.items())) or "not known"
    others, held = known["claims"] - known["required"], known["held"] - known["required_held"]
    return [finished, verdicts, *(f"{a} of {b}" if b else "–" for a, b in ((known["required_held"], known["required"]), (held, others)))]


def trace(cell: dict[str, Any]) -> str:
    """What stands behind a number: run folder, commit, recipe hash; the text of its title attribute."""
    lines = [f"{cell['recipe']} {' '.join(cell['overrides'])}".strip()]
    for run in cell["runs"]:
        commit = (run["commit"][:10] or "no commit known") + ("+changes" if run["dirty"] else "")
        lines.append(f"seed {run['seed']}: {run['folder']}  {run['status']}  commit {commit}  recipe {run['recipe_hash']}")
    return "\n".join(lines)


def write(report: dict[str, Any], out: Path, formats: list[str]) -> dict[str, str]:
    """Write the report's files below ``out``; returns what lies where."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    pictures: dict[tuple[int, int], str] = {}
    copies: dict[str, str] = {}
    if "md" in formats:
        for a, part in enumerate(report["suites"]):
            for b, panel in enumerate(part["plots"]):
                several = len({p["column"] for p in part["plots"]}) > 1 and panel["column"]
                name = f"{part['suite']}-{panel['y']}-{panel['x']}" + (f"-{panel['column']}" if several else "")
                name = re.sub(r"[^\w.-]+", "-", name)
                taken = f"{name}-{b}" if f"{name}.png" in pictures.values() else name
                plots.png(panel, out / f"{taken}.png")
                pictures[a, b] = f"{taken}.png"
            for shown in part["pictures"]:
                source = Path(shown["file"])
                copy = out / re.sub(r"[^\w.-]+", "-", f"{part['suite']}-{shown['row']}-{shown['column']}-{source.name}")
                shutil.copyfile(source, copy)
                copies[shown["file"]] = copy.name
        path = out / "report.md"
        path.write_text(markdown(report, pictures, copies), encoding="utf-8")
        files["md"] = str(path)
        if pictures:
            files["picture"] = str(out / next(iter(pictures.values())))
    if "html" in formats:
        path = out / "report.html"
        path.write_text(html(report), encoding="utf-8")
        files["html"] = str(path)
    if "json" in formats:
        path = out / "report.json"
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        files["json"] = str(path)
    return files


def html(report: dict[str, Any]) -> str:
    """One page with everything inside it; follows the reader's colour scheme."""
    import jinja2

    from xutrain.launch.plan import versions

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number,
        error=error,
        spread=spread,
        signed=signed,
        words=words,
        verdict=verdict,
        trace=trace,
        paper_number=paper_number,
        inline=inline,
        overview=overview,
    )
    count = 0
    pictures: dict[str, list[dict[str, Any]]] = {}
    for part in report["suites"]:
        for panel in part["plots"]:
            count += 1
            drawn = {"title": panel["title"], "svg": plots.svg(panel, count), "n": sorted({s["n"] for s in panel["series"]})}
            pictures.setdefault(part["suite"], []).append(drawn)
    return environment.get_template("page.html.j2").render(
        report=report, pictures=pictures, versions=versions(), index=_index, heads=OVERVIEW
    )


def _index(part: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(c["row"], c["column"]): c for c in part["cells"]}


def markdown(report: dict[str, Any], pictures: dict[tuple[int, int], str], copies: dict[str, str]) -> str:
    """The same tables as plain text; no times in it, so that equal runs give equal pages."""
    lines = [
        f"# {report['title']}",
        "",
        "Ours is mean ± sample deviation (number of seeds). A paper's number is printed only where it was read in its text.",
        "",
    ]
    if len(report["suites"]) > 1:
        lines += [_row(["suite", *OVERVIEW]), "|" + "---|" * 5]
        lines += [*(_row([known["title"], *overview(known)]) for known in report["overview"]), ""]
    for a, part in enumerate(report["suites"]):
        label = "smoke run: says that it works, not how well" if part["smoke"] else f"scale {part['scale']}"
        lines += [f"## {part['title']}", "", f"`{part['command']}` ({label})" + (f", {_source(part)}" if part["paper"]["id"] else ""), ""]
        lines += _table(part)
        if part["claims"]:
            lines += ["", "| claim | verdict | must hold at | from |", "|---|---|---|---|"]
            lines += [_row([c["text"], verdict(c["verdict"]), ", ".join(c["must_hold"]) or "-", c["source"]]) for c in part["claims"]]
        lines += ["", *[f"- {n}" for n in part["notes"]]]
        if part["paper"]["unseen"]:
            lines += [f"- The paper's numbers: {part['paper']['unseen']}"]
        lines += ["", *[f"![{panel['title']}]({pictures[a, b]})" for b, panel in enumerate(part["plots"]) if (a, b) in pictures]]
        lines += [*[f"![{p['caption']}]({copies[p['file']]})" for p in part["pictures"] if p["file"] in copies], ""]
    return "\n".join(lines).rstrip() + "\n"


def _source(part: dict[str, Any]) -> str:
    return f"arXiv {part['paper']['id']}" + (f", {part['paper']['where']}" if part["paper"]["where"] else "")


def _table(part: dict[str, Any]) -> list[str]:
    several = len(part["columns"]) > 1
    heads = [
        *(["setting"] if several else []),
        "method",
        f"{words(part['metric'])}, ours",
        "paper",
        "difference",
        "verdict",
        *map(words, part["show"]),
    ]
    rows = {r["key"]: r["label"] for r in part["rows"]}
    columns = {c["key"]: c["label"] for c in part["columns"]}
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for cell in sorted(part["cells"], key=lambda c: list(columns).index(c["column"])):
        texts = [
            *([columns[cell["column"]]] if several else []),
            rows[cell["row"]],
            spread(cell["metrics"].get(cell["metric"])),
            paper_number(cell),
        ]
        texts += [signed(cell["difference"]), verdict(cell["verdict"]), *(spread(cell["metrics"].get(m)) for m in part["show"])]
        lines.append(_row(texts))
    return lines


def _row(texts: list[str]) -> str:
    return "| " + " | ".join(t.replace("|", "\\|").replace("\n", " ") for t in texts) + " |"
