"""`xutrain export`: run folders for other tools. The record is read; nothing is trained and nothing in it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError


def register(app: typer.Typer) -> None:
    app.command("export", epilog="Examples: xutrain export runs/quantize/orq --to csv    xutrain export runs --to wandb")(export)


def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Run folders, or folders of them.")],
    to: Annotated[str, typer.Option("--to", metavar="wandb|tensorboard|csv", help="The tool.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go.", show_default="export/ in each run folder")
    ] = None,
    online: Annotated[bool, typer.Option("--online", help="With wandb: send it now; left out, `wandb sync` sends it later.")] = False,
    project: Annotated[str, typer.Option("--project", metavar="NAME", help="With wandb: the project.")] = "xutrain",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Give the values of runs to Weights & Biases (offline), TensorBoard or a CSV file."""
    from xutrain.report import export as writers
    from xutrain.report import runs as run_folders

    if to not in writers.TOOLS:
        raise UsageError(Issue("--to", "must be wandb, tensorboard or csv", to))
    if online and to != "wandb":
        raise UsageError(Issue("--online", f"means nothing for --to {to}", has_value=False, hint="leave it out"))
    if missing := [str(p) for p in runs if not p.exists()]:
        raise UsageError(Issue("RUNS", "no such folder", ", ".join(missing), "what is there: xutrain runs ls"))
    found = run_folders.read_all(run_folders.below(runs))
    rows = []
    for run in found:
        folder = run.folder / "export" if out is None else out / writers.name_of(run) if len(found) > 1 else out
        path = writers.export(run, to, folder, online=online, project=project)
        rows.append({"run": str(run.folder), "status": run.status, "to": to, "path": str(path), "values": len(run.lines)})
    if json:
        console.print_json(rows)
        return
    for row in rows:
        note = "" if row["status"] == "done" else f"  (the run is {row['status']}: its values so far)"
        console.out.print(f"{row['path']}: {row['values']} values{note}", markup=False)
    if to == "tensorboard":
        console.err.print(f"look at it: tensorboard --logdir {out or runs[0]}", markup=False)
    if to == "wandb" and not online:
        console.err.print("send it later: wandb sync FOLDER/offline-run-*", markup=False)
