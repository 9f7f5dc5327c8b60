"""`xutrain report`: run folders beside the papers, as a table here and as pages on disk. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError

FORMATS = ("md", "html", "json")


def register(app: typer.Typer) -> None:
    app.command("report", epilog="Examples: xutrain report demo    xutrain report all --check    xutrain report runs/quantize/orq")(report)


def report(
    names: Annotated[
        list[str], typer.Argument(metavar="SUITE|RUNS...", help="Suites, a paper's short name, all; or run folders and folders of them.")
    ],
    scale: Annotated[str, typer.Option("--scale", metavar="cpu|paper", help="The suites' scale.")] = "cpu",
    smoke: Annotated[bool, typer.Option("--smoke", help="The runs of `xutrain sweep --smoke`.")] = False,
    formats: Annotated[str, typer.Option("--format", metavar="md,html,json", help="Files to write.")] = "md,html,json",
    check: Annotated[bool, typer.Option("--check", help="Exit code 5 where a cell or a claim that must hold does not.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes.", show_default="RUNS/reports/NAME")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run folders are.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document on stdout.")] = False,
) -> None:
    """Compare runs with the papers' tables and claims: Markdown, one HTML page, JSON."""
    from xutrain.report import page
    from xutrain.report import suite as suites

    wanted = [f.strip() for f in formats.split(",")]
    for name in wanted:
        if name not in FORMATS:
            raise UsageError(Issue("--format", "must be some of md, html, json", name))
    if scale not in suites.SCALES:
        raise UsageError(Issue("--scale", "must be cpu or paper", scale))
    if not names:
        raise UsageError(
            Issue("SUITE|RUNS", "says nothing to report", has_value=False, hint="xutrain report demo; all suites: xutrain ls suites")
        )
    value, title = _collect(names, scale, smoke, runs)
    folder = out if out is not None else runs / "reports" / title
    value["files"] = page.write(value, folder, wanted)
    if json:
        console.print_json(value)
    else:
        for part in value["suites"]:
            print_table(part)
            _print_claims(part)
        if len(value["suites"]) > 1:
            _print_overview(value)
        for kind, path in value["files"].items():
            console.out.print(f"{_WORDS[kind]}: {path}", markup=False)
    if check:
        for fault in value["faults"]:
            console.err.print(f"error: {fault}", markup=False)
        raise typer.Exit(5 if value["faults"] else 0)


_WORDS = {"md": "text", "html": "page", "json": "numbers", "picture": "picture"}


def _collect(names: list[str], scale: str, smoke: bool, out: Path) -> tuple[dict[str, Any], str]:
    from xutrain.report import build, overview
    from xutrain.report import runs as run_folders
    from xutrain.report import suite as suites

    folders = [Path(n) for n in names if Path(n).is_dir()]
    if folders and len(folders) < len(names):
        raise UsageError(Issue("SUITE|RUNS", "mixes suites and run folders", " ".join(names), "report them one after the other"))
    if folders:
        sections = [build.section_of_runs(run_folders.below(folders))]
        title, name = "Runs", "runs"
    else:
        chosen = [n for n in suites.select(names) if names == [n] or suites.has_scale(n, scale)]
        sections = [build.section(suites.open_table(n, scale, smoke=smoke or _only_smoke(n, scale, out)), out) for n in chosen]
        if not sections:
            raise UsageError(Issue("SUITE", f"nothing of this has the scale {scale}", " ".join(names)))
        name = "-".join(Path(n).stem for n in names) + ("" if scale == "cpu" else f"-{scale}")
        papers = len({s["paper"]["id"] for s in sections} - {""})
        title = sections[0]["title"] if len(sections) == 1 else f"xutrain: {papers} paper{'s' * (papers > 1)} in {len(sections)} suites"
    return overview.report(title, sections), name


def _print_overview(value: dict[str, Any]) -> None:
    """One line a suite, after the last of them."""
    from xutrain.report import page

    console.out.print("\nAll suites", style="bold", markup=False)
    console.table(["suite", *page.OVERVIEW], [[known["suite"], *page.overview(known)] for known in value["overview"]], wrap=False)


def _only_smoke(name: str, scale: str, out: Path) -> bool:
    """Whether a suite was swept with --smoke only."""
    here = out / "suites"
    stem = Path(name).stem
    return not (here / f"{stem}.{scale}.json").exists() and (here / f"{stem}.{scale}.smoke.json").exists()


def print_table(part: dict[str, Any]) -> None:
    """The suite's table on stdout."""
    from xutrain.report import page

    label = "  (smoke run: says that it works, not how well)" if part["smoke"] else ""
    console.out.print(f"\n{part['title']}  [scale {part['scale']}]{label}", style="bold", markup=False)
    rows = {r["key"]: r["label"] for r in part["rows"]}
    columns = {c["key"]: c["label"] for c in part["columns"]}
    several, known = len(columns) > 1, any(c["published"] for c in part["cells"])
    judged = any(c["verdict"] for c in part["cells"])
    heads = ["method", *(["setting"] if several else []), "seeds", page.words(part["metric"]), *(["paper", "difference"] if known else [])]
    heads += [*(["verdict"] if judged else []), *map(page.words, part["show"])]
    lines = []
    for cell in part["cells"]:
        line = [
            rows[cell["row"]],
            *([columns[cell["column"]]] if several else []),
            cell["n"],
            page.spread(cell["metrics"].get(cell["metric"]), count=False),
        ]
        line += [page.paper_number(cell), page.signed(cell["difference"])] if known else []
        lines.append(
            [
                *line,
                *([cell["verdict"] or "-"] if judged else []),
                *(page.spread(cell["metrics"].get(m), count=False) for m in part["show"]),
            ]
        )
    console.table(heads, lines, wrap=False)
    if not known and part["paper"]["id"]:
        console.out.print("the paper's numbers: not known", markup=False)


def _print_claims(part: dict[str, Any]) -> None:
    from xutrain.report import page

    for claim in part["claims"]:
        console.out.print(
            f"  {page.verdict(claim['verdict']):<12} {claim['text']}" + ("" if claim["required"] else "  (not required at this scale)"),
            markup=False,
        )
