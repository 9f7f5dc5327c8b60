"""`xutrain runs`: what lies in the run folders. Reads files only."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.engine.record import read_json, read_metrics
from xutrain.errors import Issue, UsageError
from xutrain.launch.plan import run_lock

app = typer.Typer(no_args_is_help=True)
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders are.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def folders(root: Path, under: str = "") -> list[Path]:
    """Run folders below ``root``, those of ``under`` (verb, verb/recipe, ...) only."""
    return sorted(f.parent for f in (root / under).rglob("run.json") if (f.parent / "recipe.yaml").exists())


@app.command("ls", epilog="Example: xutrain runs ls quantize/orq")
def ls(
    under: Annotated[str, typer.Argument(help="verb, or verb/recipe", show_default=False)] = "", out: Out = Path("runs"), json: Json = False
) -> None:
    """List runs with their status and their main numbers."""
    rows = [_row(f) for f in folders(out, under)]
    if json:
        console.print_json(rows)
    elif not rows:
        console.out.print(f"no runs under {out / under}", markup=False)
    else:
        shown = [
            [r["verb"], r["recipe"], r["method"], r["codec"], r["seed"], r["status"], r["step"], _short(r["metrics"]), r["run"]]
            for r in rows
        ]
        console.table(["verb", "recipe", "method", "codec", "seed", "status", "step", "metrics", "folder"], shown, wrap=False)


def _row(folder: Path) -> dict[str, Any]:
    run, state = read_json(folder / "run.json"), read_json(folder / "state.json")
    head = {key: run.get(key) for key in ("verb", "recipe", "method", "codec", "seed")}
    result = state.get("result")
    return {
        **head,
        "run": str(folder),
        "status": "killed" if _killed(run, state) else state.get("status", "queued"),
        "step": state.get("step"),
        "metrics": result.get("metrics", {}) if isinstance(result, dict) else {},
    }


def _killed(run: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether a run says that it runs as a process of this machine which is not there: it could not say how it ended."""
    host, pid = run.get("host"), state.get("pid")
    if state.get("status") != "running" or state.get("job") or not isinstance(pid, int) or not isinstance(host, dict):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return host.get("name") == platform.node()
    except OSError:  # somebody else's
        pass
    return False


def _short(metrics: dict[str, Any]) -> str:
    wanted = [k for k in ("test_accuracy", "dice", "perplexity", "val_loss", "auc", "objective", "test_loss") if metrics.get(k) is not None]
    return "  ".join(f"{k} {metrics[k]:.4g}" for k in wanted[:2])


@app.command("show", epilog="Example: xutrain runs show runs/quantize/orq/1a2b3c4d/seed0")
def show(run: Annotated[Path, typer.Argument(help="A run folder.")], json: Json = False) -> None:
    """Show one run: its state, its notes, its newest values."""
    folder = _open(run)
    newest: dict[str, Any] = {}
    for line in read_metrics(folder):
        newest[str(line["name"])] = {"step": line["step"], "value": line["value"]}
    value = {
        **_row(folder),
        "notes": read_json(folder / "run.json").get("notes", []),
        "state": read_json(folder / "state.json"),
        "newest": newest,
    }
    if json:
        console.print_json(value)
        return
    console.table(
        ["what", "value"],
        [[k, value[k]] for k in ("run", "verb", "recipe", "method", "codec", "seed", "status")] + [["note", n] for n in value["notes"]],
    )
    console.table(["metric", "step", "value"], [[n, v["step"], v["value"]] for n, v in newest.items()])


@app.command("stop", epilog="Example: xutrain runs stop runs/quantize/orq/1a2b3c4d/seed0 --at-step 500")
def stop(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    at_step: Annotated[int | None, typer.Option(min=0, help="Stop after this many steps instead of at the next boundary.")] = None,
) -> None:
    """Ask a run to save and stop at the next step boundary; works across machines."""
    folder = _open(run)
    status = read_json(folder / "state.json").get("status")
    if status == "done":
        raise UsageError(Issue(str(run), "is finished", has_value=False))
    (folder / "STOP").write_text("" if at_step is None else f"{at_step}\n", encoding="utf-8")
    console.err.print(f"asked {folder} to stop; the same command goes on from its checkpoint", markup=False)


@app.command("rm", epilog="Example: xutrain runs rm runs/quantize/orq/1a2b3c4d/seed0 --yes")
def rm(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove run folders."""
    opened = [_open(r) for r in runs]
    if not yes and not typer.confirm(f"remove {len(opened)} run folder(s)?", err=True):
        raise typer.Exit(1)
    for folder in opened:
        with run_lock(folder):  # never from under a run
            shutil.rmtree(folder)
        console.err.print(f"removed {folder}", markup=False)


def _open(run: Path) -> Path:
    if not (run / "run.json").is_file():
        raise UsageError(Issue("RUN", "is not a run folder (it has no run.json)", str(run), "xutrain runs ls"))
    return run
