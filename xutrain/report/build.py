"""From suites and run folders to one value that every format prints: the same numbers in Markdown, HTML and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xutrain.engine.record import read_json
from xutrain.errors import Issue, UsageError
from xutrain.report import claims, pictures, policy, published, runs
from xutrain.report.runs import Run
from xutrain.report.suite import Line, Plot, Suite, Table

AXES = {"bits": "bits_up", "time": "wall_s", "step": "step", "epoch": "epoch", "round": "round"}


def section(table: Table, out: Path) -> dict[str, Any]:
    """A suite with what its runs under ``out`` say. Raises Failed for a changed record, UsageError for runs that disagree."""
    manifest = read_json(out / "suites" / table.manifest).get("cells", {})
    found: dict[tuple[str, str], list[Run]] = {}
    stale: list[str] = []
    for cell in table.cells:
        known = manifest.get(cell.key)
        if not isinstance(known, dict) or known.get("spec") != cell.spec:
            stale += [cell.key] if isinstance(known, dict) else []
            continue
        wanted = sorted({*known.get("seeds", []), *table.seeds})
        folders = [out / str(known["folder"]) / f"seed{seed}" for seed in wanted]
        found[cell.row, cell.column] = runs.read_all(f for f in folders if (f / "run.json").is_file())
    overrides = {(c.row, c.column): (c.recipe, list(c.overrides)) for c in table.cells}
    notes = [f"{len(stale)} cells changed since they ran and count as missing: {', '.join(stale)}"] if stale else []
    return _section(table, found, overrides, notes, published.papers())


def section_of_runs(folders: list[Path]) -> dict[str, Any]:
    """A table of run folders outside any suite, one row a recipe. Raises as ``section`` does."""
    read = runs.read_all(folders)
    grouped: dict[str, list[Run]] = {}
    for run in read:
        head = run.run
        grouped.setdefault(f"{head.get('verb')}/{head.get('recipe')} {run.group}", []).append(run)
    metrics = {n for r in read for n in r.metrics}
    wanted: list[str] = [
        m for m in ("test_accuracy", "dice", "perplexity", "val_loss", "auc", "objective", "test_loss", "train_loss") if m in metrics
    ]
    main = wanted[0] if wanted else next(iter(sorted(metrics)), "test_loss")
    logged = main in {line["name"] for r in read for line in r.lines}
    suite = Suite(
        summary="Runs as they lie in their folders",
        title="Runs",
        rows={key: Line(label=key) for key in grouped},
        seeds=sorted({r.seed for r in read}),
        metric=main,
        better="lower" if main in ("perplexity", "objective") or main.endswith("loss") else "higher",
        show=wanted[1:3],
        plots=[Plot(y=main, x="bits", log_x=True), Plot(y=main, x="step")] if logged else [],
    )
    smoke = bool(read) and all(r.result.get("scale") == "smoke" for r in read)
    table = Table("runs", "as run", smoke, suite, (), tuple(suite.seeds))
    return _section(table, {(key, "all"): group for key, group in grouped.items()}, {}, [], [])


def _section(
    table: Table,
    found: dict[tuple[str, str], list[Run]],
    recipes: dict[tuple[str, str], tuple[str, list[str]]],
    notes: list[str],
    papers: list[published.Paper],
) -> dict[str, Any]:
    suite = table.suite
    for key, group in found.items():
        runs.agree(group, f"suite {table.name}, {'/'.join(key)}")
    used = {(c.row, c.column) for c in table.cells} or set(found)
    rows = [r for r in suite.rows if any(r == row for row, _ in used)]
    columns = [c for c in suite.columns if any(c == column for _, column in used)]
    cells = [
        _cell(row, column, table, found.get((row, column), []), recipes.get((row, column)), papers)
        for row in rows
        for column in columns
        if (row, column) in used
    ]
    _compare(cells, table)
    judged = _judge(table, found, columns, papers)
    paper = next((p for p in papers if p.content.id == suite.paper), None)
    drawn = [*suite.plots, *policy.plots(r for group in found.values() for r in group)]
    return {
        "suite": table.name,
        "group": suite.group,
        "scale": table.scale,
        "smoke": table.smoke,
        "title": suite.title or suite.summary,
        "summary": suite.summary,
        "paper": {
            "id": suite.paper,
            "where": suite.where,
            "title": paper.content.title if paper else "",
            "venue": paper.content.venue if paper else "",
            "authors": paper.content.authors if paper else "",
            "unseen": paper.content.unseen if paper else "",
        },
        "metric": suite.metric,
        "better": suite.better,
        "show": suite.show,
        "seeds": list(table.seeds),
        "rows": [{"key": r, "label": suite.rows[r].label or r, "note": suite.rows[r].note} for r in rows],
        "columns": [{"key": c, "label": suite.columns[c].label or c, "note": suite.columns[c].note} for c in columns],
        "cells": cells,
        "claims": judged,
        "pictures": pictures.of_cells(
            (row, column, suite.rows[row].label or row, (suite.columns[column].label or column) if len(columns) > 1 else "", known)
            for row in rows
            for column in columns
            if (known := found.get((row, column), []))
        ),
        "plots": [p for plot in drawn for p in _plots(plot, table, found, rows, columns)],
        "notes": [*suite.notes, *notes, *sorted({n for c in cells for n in c["notes"]})],
        "command": _command(table),
    }


def _command(table: Table) -> str:
    """What makes the runs of a table, or, for run folders outside any suite, what made the report."""
    if not table.cells:
        return "xutrain report RUN_FOLDERS"
    return f"xutrain sweep {table.name}" + (f" --scale {table.scale}" if table.scale != "cpu" else "") + (" --smoke" if table.smoke else "")


def _cell(
    row: str, column: str, table: Table, group: list[Run], recipe: tuple[str, list[str]] | None, papers: list[published.Paper]
) -> dict[str, Any]:
    done = [r for r in group if r.status == "done"]
    bad = sorted({r.status for r in group} - {"done"})
    names = sorted({n for r in done for n in {**r.metrics, **r.bits}})
    metric = table.suite.metric_of(column)
    names += [n for n in (metric, *table.suite.show) if ":" in n]
    numbers = {n: _spread(known) for n in names if (known := [v for r in done if (v := claims.value(r, n)) is not None])}
    said = _published(row, column, table, papers)
    missing = sorted({*table.seeds} - {r.seed for r in done})
    return {
        "row": row,
        "column": column,
        "metric": metric,
        "recipe": recipe[0] if recipe else "",
        "overrides": recipe[1] if recipe else [],
        "n": len(done),
        "seeds": [r.seed for r in done],
        "missing_seeds": missing,
        "may_diverge": table.suite.rows[row].may_diverge or table.suite.columns[column].may_diverge,
        "status": "done"
        if done and not bad and not missing
        else "diverged"
        if bad == ["diverged"]
        else "partly done"
        if done
        else bad[0]
        if bad
        else "missing",
        "metrics": numbers,
        "published": said,
        "difference": None,
        "verdict": "",
        "why": "",
        "runs": [r.trace() for r in group],
        "notes": [str(n) for r in done for n in r.run.get("notes", []) if not str(n).startswith("resumed from")],
    }


def _spread(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


def _published(row: str, column: str, table: Table, papers: list[published.Paper]) -> dict[str, Any] | None:
    for paper in papers:
        for key, found in paper.tables_of(table.name).items():
            number = found.number(row, column)
            if number is not None and found.metric == table.suite.metric_of(column):
                return {
                    "value": number.value,
                    "std": number.std,
                    "where": found.where,
                    "source": found.source,
                    "table": key,
                    "scale": found.scale,
                    "tolerance": found.tolerance,
                    "note": number.note,
                }
    return None


def _compare(cells: list[dict[str, Any]], table: Table) -> None:
    """Difference and verdict of every cell."""
    for cell in cells:
        ours, said = cell["metrics"].get(cell["metric"]), cell["published"]
        if ours is not None and said is not None:
            cell["difference"] = ours["mean"] - said["value"]
        cell["verdict"], cell["why"] = _verdict(cell, cells, table)


def _verdict(cell: dict[str, Any], cells: list[dict[str, Any]], table: Table) -> tuple[str, str]:
    metric, said = cell["metric"], cell["published"]
    ours = cell["metrics"].get(metric)
    if cell["n"] == 0 or ours is None:
        return (cell["status"] if cell["status"] in ("failed", "diverged") else "missing"), f"no finished run has {metric}"
    if table.smoke:
        return "smoke only", "a smoke run says that it works, not how well"
    if ours["n"] < 2:
        lost = sum(run["status"] == "diverged" for run in cell["runs"])
        if lost > 1:
            return "diverged", f"{lost} of {len(cell['runs'])} seeds diverged"
        return "one seed", "no verdict from a single seed"
    if said is None:
        return "", "the paper's number is not known"
    if table.scale == said["scale"]:
        error = math.hypot(ours["std"] / math.sqrt(ours["n"]), said["std"] or 0.0)
        allowed = max(2 * error, said["tolerance"])
        return ("match" if abs(cell["difference"]) <= allowed else "off"), f"difference {cell['difference']:+.4g}, allowed {allowed:.3g}"
    against = [
        c
        for c in cells
        if c is not cell and c["column"] == cell["column"] and c["published"] and metric in c["metrics"] and c["metrics"][metric]["n"] > 1
    ]
    if not against:
        return "", "no other cell of this column to order it with"
    wrong = [c["row"] for c in against if _contradicts(cell, c, metric)]
    return (
        ("ordering fails", "the paper has it the other way than " + ", ".join(wrong))
        if wrong
        else ("ordering holds", f"as in the paper against {len(against)} rows")
    )


def _contradicts(cell: dict[str, Any], other: dict[str, Any], metric: str) -> bool:
    """Whether two cells are in the opposite order of the paper's, beyond two standard errors of their difference."""
    paper = cell["published"]["value"] - other["published"]["value"]
    a, b = cell["metrics"][metric], other["metrics"][metric]
    ours = a["mean"] - b["mean"]
    error = math.hypot(a["std"] / math.sqrt(a["n"]), b["std"] / math.sqrt(b["n"]))
    return bool(paper * ours < 0 and abs(ours) > 2 * error)


def _judge(
    table: Table, found: dict[tuple[str, str], list[Run]], columns: list[str], papers: list[published.Paper]
) -> list[dict[str, Any]]:
    cells = {(c.row, c.column): {r.seed: r for r in found.get((c.row, c.column), [])} for c in table.cells}
    judged = []
    for paper in papers:
        for key, claim in paper.claims_of(table.name).items():
            if not _known(claim, table, paper, key):
                continue
            verdict = claims.judge(claim, cells, columns, table.suite, table.scale, table.smoke)
            judged.append({"id": f"{paper.name}.{key}", **verdict})
    return judged


def _known(claim: published.Claim, table: Table, paper: published.Paper, key: str) -> bool:
    """Whether the suite has the claim's cells at this scale. Raises UsageError where it must hold here and has not."""
    for side in (claim.left, claim.right):
        if isinstance(side, published.Side) and (
            side.row not in table.suite.rows or (side.column or next(iter(table.suite.columns))) not in table.suite.columns
        ):
            if table.scale not in claim.must_hold:
                return False
            where, hint = f"{paper.path}: claims.{key}", f"rows: {', '.join(table.suite.rows)}; columns: {', '.join(table.suite.columns)}"
            raise UsageError(Issue(where, f"suite {table.name} has no such cell at scale {table.scale}", f"{side.row}/{side.column}", hint))
    return True


def _plots(plot: Plot, table: Table, found: dict[tuple[str, str], list[Run]], rows: list[str], columns: list[str]) -> list[dict[str, Any]]:
    """One panel a column, or one of all columns; panels without a point are left out."""
    if plot.kind == "columns":
        return _over_columns(plot, table, found, rows, columns)
    draw: Callable[[Plot, list[Run]], list[dict[str, float | None]]] = _curve if plot.kind == "curve" else _point
    panels = []
    for column in plot.columns or columns:
        series = []
        for row in rows:
            done = [r for r in found.get((row, column), []) if r.status == "done"]
            points = draw(plot, done) if done else []
            if points:
                series.append({"row": row, "label": table.suite.rows[row].label or row, "n": len(done), "points": points})
        if series:
            label = table.suite.columns[column].label
            title = plot.title or f"{plot.y.replace('_', ' ')} against {plot.x.replace('_', ' ')}"
            several = len(plot.columns or columns) > 1
            panels.append({"y": plot.y, "x": plot.x, "kind": plot.kind, "log_x": plot.log_x, "log_y": plot.log_y, "column": column,
                           "title": f"{title}: {label or column}" if several else title, "series": series})  # fmt: skip
    return panels


def _over_columns(
    plot: Plot, table: Table, found: dict[tuple[str, str], list[Run]], rows: list[str], columns: list[str]
) -> list[dict[str, Any]]:
    """One line a row through the columns that say where they stand, each with its own metric where the plot has the suite's."""
    suite, series = table.suite, []
    placed = sorted((at, c) for c in plot.columns or columns if (at := suite.columns[c].at) is not None)
    for row in rows:
        points, seeds = [], 0
        for at, column in placed:
            name = suite.metric_of(column) if plot.y == suite.metric else plot.y
            done = [r for r in found.get((row, column), []) if r.status == "done"]
            values = [v for r in done if (v := claims.value(r, name)) is not None]
            if values:
                spread = _spread(values)
                points.append({"x": at, "mean": spread["mean"], "std": spread["std"]})
                seeds = max(seeds, len(values))
        if points:
            series.append({"row": row, "label": suite.rows[row].label or row, "n": seeds, "points": points})
    title = plot.title or f"{plot.y.replace('_', ' ')} against {plot.x}"
    panel = {"y": plot.y, "x": plot.x, "kind": plot.kind, "log_x": plot.log_x, "log_y": plot.log_y, "column": "", "title": title}
    return [{**panel, "series": series}] if series else []


def _curve(plot: Plot, done: list[Run]) -> list[dict[str, float | None]]:
    """Mean and deviation over the seeds at the steps that all of them logged, a few hundred of them."""
    curves = [{line["step"]: line for line in run.curve(plot.y)} for run in done]
    steps = runs.thinned(sorted(set.intersection(*(set(c) for c in curves)))) if curves else []
    axis = AXES.get(plot.x, plot.x)
    points: list[dict[str, float | None]] = []
    for step in steps:
        at = [claims.axis_value(run, c[step], axis) for run, c in zip(done, curves, strict=True)]
        known = [x for x in at if x is not None]
        if len(known) < len(at) or (plot.log_x and min(known) <= 0):
            continue
        spread = _spread([float(c[step]["value"]) for c in curves])
        band = policy.deviation(done, plot.y, step)
        points.append({"x": statistics.fmean(known), "mean": spread["mean"], "std": spread["std"] if band is None else band})
    return points


def _point(plot: Plot, done: list[Run]) -> list[dict[str, float | None]]:
    numbers = [{**r.metrics, **r.bits} for r in done]
    axis = "bits_up" if plot.x == "bits" else plot.x
    both = [n for n in numbers if axis in n and plot.y in n]
    if not both or (plot.log_x and min(n[axis] for n in both) <= 0):
        return []
    y = _spread([n[plot.y] for n in both])
    return [{"x": statistics.fmean(n[axis] for n in both), "mean": y["mean"], "std": y["std"]}]
