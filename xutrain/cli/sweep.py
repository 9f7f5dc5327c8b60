"""`xutrain sweep`: run what is missing of a suite, and print its table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xutrain.cli import console
from xutrain.cli.train import show_jobs
from xutrain.errors import Issue, UsageError

if TYPE_CHECKING:
    from xutrain.report.suite import Table

Scale = Annotated[
    str, typer.Option("--scale", metavar="cpu|paper", help="cpu: embedded data, minutes on two cores; paper: the published setting.")
]


def register(app: typer.Typer) -> None:
    app.command("sweep", epilog="Example: xutrain sweep demo    Next: xutrain report demo    All suites: xutrain ls suites")(sweep)


def sweep(
    names: Annotated[list[str], typer.Argument(metavar="SUITE...", help="Suites, a paper's short name, or all.")],
    scale: Scale = "cpu",
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds instead of the suite's.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time, one thread each.", show_default="the cores")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes of each run.")] = 1,
    only: Annotated[str | None, typer.Option(metavar="PATTERNS", help="Rows, or row/column, with * and commas: orq*,fp")] = None,
    launcher: Annotated[str | None, typer.Option(metavar="local|slurm", help="Where cells run.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="SLURM profile: a name under configs/clusters, or a path.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every cell with its recipe's smoke overrides: seconds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run; run nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again; old run folders are moved aside.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders go.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run what is missing of suites: finished runs are recalled, unfinished ones go on."""
    from xutrain.cli.train import parse_seeds
    from xutrain.launch import sweep as sweeping
    from xutrain.report import suite as suites

    if scale not in suites.SCALES:
        raise UsageError(Issue("--scale", "must be cpu or paper", scale))
    if launcher not in (None, "local", "slurm"):
        raise UsageError(Issue("--launcher", "must be local or slurm", launcher))
    wanted = parse_seeds(seeds) if seeds is not None else None
    chosen = [n for n in suites.select(names) if (len(names) == 1 and names == [n]) or suites.has_scale(n, scale)]
    if not chosen:
        raise UsageError(Issue("SUITE", f"nothing of this has the scale {scale}", " ".join(names)))
    patterns = [p.strip() for p in only.split(",")] if only else None
    tables = [suites.open_table(n, scale, smoke=smoke, seeds=wanted, only=patterns) for n in chosen]
    if fresh and not dry_run:  # every suite is known to be right before the first folder is moved
        for table in tables:
            sweeping.prepare(table, out=out, nproc=nproc, launcher=launcher)
    prepared = [(t, sweeping.prepare(t, out=out, nproc=nproc, fresh=fresh and not dry_run, launcher=launcher)) for t in tables]
    if launcher == "slurm":
        _slurm(prepared, cluster, dry_run, smoke, out, json)
        return
    if dry_run:
        _show_plan(prepared, fresh, json)
        return
    values, worst = [], 0
    count = jobs or _cores()
    if len(prepared) > 1 and not quiet:
        _tell_total(prepared, count)
    for table, work in prepared:
        manifest = sweeping.write_manifest(table, work, out)
        tell = (lambda text: None) if quiet else lambda text: console.err.print(text, markup=False)
        head = f"suite {table.name}, scale {table.scale}{' (smoke)' if smoke else ''}"
        tell(f"{head}: {len(table.cells)} cells x {len(table.seeds)} seeds{_estimate(table, work, count)}")
        results, stopped = sweeping.carry_out(work, count, tell, again=fresh)
        codes = [
            0 if r["exit_code"] == 4 and _may_diverge(table, job) else int(r["exit_code"]) for job, r in zip(work, results, strict=True)
        ]
        worst = max([worst, *codes], key=lambda code: (code != 0, code == 1, code))
        values.append(_value(table, work, results, manifest))
        if stopped:
            break
    if json:
        console.print_json(values[0] if len(prepared) == 1 else {"suites": values})
    else:
        _show_tables(tables[: len(values)], out)
        flags = (f" --scale {scale}" if scale != "cpu" else "") + (" --smoke" if smoke else "")
        flags += f" --runs {out}" if out != Path("runs") else ""
        console.err.print(f"next: xutrain report {' '.join(names)}{flags}", markup=False)
    raise typer.Exit(worst)


def _left(table: Table, work: list[Any]) -> tuple[int, float | None]:
    """Runs that are not finished, and the CPU minutes that they take by the suite's own measure (None: it gives none)."""
    ended = {job.plan.folder: job.ended for job in work}
    missing = sum(not e for e in ended.values())
    minutes = table.suite.minutes if table.scale == "cpu" and not table.smoke else None
    return missing, None if minutes is None else minutes * missing / max(1, len(ended))


def _estimate(table: Table, work: list[Any], count: int) -> str:
    missing, minutes = _left(table, work)
    if not missing or minutes is None:
        return ""
    return f", {missing} runs to do, about {max(1, round(minutes / count))} min on {count} free core{'s' if count > 1 else ''}"


def _tell_total(prepared: list[tuple[Table, list[Any]]], count: int) -> None:
    """One line before several suites: how much there is to do, and about how long it takes."""
    left = [(table.name, *_left(table, work)) for table, work in prepared]
    known = sum(minutes for _, _, minutes in left if minutes is not None)
    unknown = [name for name, missing, minutes in left if missing and minutes is None]
    text = f"{len(left)} suites, {sum(missing for _, missing, _ in left)} runs to do"
    if known:
        text += f", about {max(1, round(known / count))} min on {count} free core{'s' if count > 1 else ''}"
    if unknown:
        text += f"; no estimate for {', '.join(unknown)}"
    console.err.print(text, markup=False)


def _may_diverge(table: Table, job: Any) -> bool:
    return table.suite.rows[job.cell.row].may_diverge or table.suite.columns[job.cell.column].may_diverge


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _value(table: Table, work: list[Any], results: list[dict[str, Any]], manifest: Path) -> dict[str, Any]:
    from xutrain.launch.run import public

    cells = [{"row": job.cell.row, "column": job.cell.column, **public(result)} for job, result in zip(work, results, strict=True)]
    counts: dict[str, int] = {}
    for result in results:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    return {"suite": table.name, "scale": table.scale, "smoke": table.smoke, "manifest": str(manifest), "counts": counts, "cells": cells}


def _show_plan(prepared: list[tuple[Table, list[Any]]], fresh: bool, json: bool) -> None:
    rows = [
        {
            "suite": table.name,
            "cell": job.cell.key,
            "seed": job.seed,
            "status": job.status,
            "recipe": job.cell.recipe,
            "overrides": list(job.cell.overrides),
            "run": str(job.plan.folder),
        }
        for table, work in prepared
        for job in work
    ]
    if json:
        console.print_json({"status": "dry-run", "runs": rows})
        return
    console.table(
        ["suite", "cell", "seed", "status", "recipe", "overrides"], [[*list(r.values())[:5], " ".join(r["overrides"])] for r in rows]
    )
    ended = {job.plan.folder: job.ended and not fresh for _, work in prepared for job in work}
    console.out.print(f"{sum(not e for e in ended.values())} of {len(ended)} runs would start", markup=False)


def _show_tables(tables: list[Table], out: Path) -> None:
    from xutrain.cli.report import print_table
    from xutrain.report import build

    for table in tables:
        print_table(build.section(table, out))


def _slurm(prepared: list[tuple[Table, list[Any]]], cluster: str | None, dry_run: bool, smoke: bool, out: Path, json: bool) -> None:
    """Hand the runs that are not finished to the job script of the verbs."""
    from xutrain.launch import slurm
    from xutrain.launch.sweep import write_manifest

    waiting = {job.plan.folder: job.plan for _, work in prepared for job in work if not job.ended}
    plans = list(waiting.values())  # cells that are the same run are submitted once
    if not dry_run:
        for table, work in prepared:
            write_manifest(table, work, out)
    if not plans:
        console.err.print("every run is finished", markup=False)
        return
    answer = slurm.launch(plans, cluster, dry_run=dry_run, smoke=smoke)
    if json:
        console.print_json(answer[0] if len(answer) == 1 else {"runs": answer})
    else:
        show_jobs(answer)
