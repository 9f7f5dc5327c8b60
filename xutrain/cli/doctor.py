"""`xutrain doctor`: what this machine can do, and whether a recipe computes the same on one process and on several."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog="Examples: xutrain doctor    xutrain doctor --parity quantize/orq --nproc 4")(doctor)


def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides for --parity.", show_default=False)
    ] = None,
    parity: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Run a recipe on one process and on --nproc, and compare every step bit by bit.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=2, help="Processes.", show_default="2")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps (rounds, events) of --parity.")] = 20,
    whole: Annotated[bool, typer.Option("--whole", help="--parity with the recipe as it is, not its smoke size.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders go; its file system is looked at.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Check versions, devices, processes, file system, data, W&B and SLURM; or a recipe's parity."""
    if parity is not None:
        _parity(parity, list(overrides or []), nproc, steps, not whole, json)
    if overrides:
        raise UsageError(Issue("KEY=VALUE", "is for --parity RECIPE", " ".join(overrides)))
    from xutrain.launch.probe import checks

    rows = checks(out, nproc or 2)
    bad = any(r["status"] == "fail" for r in rows)
    if json:
        console.print_json({"status": "fail" if bad else "ok", "checks": rows})
    else:
        for row in rows:
            console.out.print(f"[{_COLOURS[row['status']]}]{row['status']:5}[/]", end="")
            console.out.print(f"{row['check']:12} {row['value']}", markup=False)
            if row["hint"]:
                console.out.print(f"{'':18}-> {row['hint']}", markup=False)
    raise typer.Exit(1 if bad else 0)


def _parity(config: str, overrides: list[str], nproc: int | None, steps: int, smoke: bool, json: bool) -> None:
    from xutrain.launch import compare
    from xutrain.recipe.load import load

    loaded = load(config, None, overrides, smoke=smoke)
    count = loaded.recipe.participants
    if count == 1:
        raise UsageError(
            Issue("--parity", f"has one participant ({loaded.recipe.participants_key}=1), so there is nothing to spread", config)
        )
    processes = nproc or next(p for p in range(2, count + 1) if count % p == 0)
    with tempfile.TemporaryDirectory(prefix="xutrain-parity-") as home:
        folders = [
            compare.traced(config, loaded.verb, overrides, steps=steps, out=Path(home) / str(p), nproc=p, smoke=smoke)
            for p in (1, processes)
        ]
        found = compare.first_difference(*folders)
        number = compare.compared(*folders)
    title = f"{loaded.verb}/{loaded.name}: 1 process and {processes} processes, {count} participants"
    tell(title, found, number, json, {"recipe": loaded.name, "verb": loaded.verb, "nproc": [1, processes], "participants": count})
    raise typer.Exit(1 if found else 0)


def tell(title: str, found: dict[str, Any] | None, number: int, json: bool, head: dict[str, Any]) -> None:
    """The outcome of a comparison."""
    from xutrain.launch.compare import sentence

    if json:
        console.print_json({**head, "status": "different" if found else "equal", "steps": number, "difference": found})
        return
    compared = (
        f"{number} saved step{'s' if number != 1 else ''}" if number else "no saved steps, so by the files and metrics that both left"
    )
    console.out.print(f"{title}, {compared}", markup=False)
    console.out.print(sentence(found) if found else "bit-equal at every step", markup=False)
