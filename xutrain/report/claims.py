"""Whether a claim holds among a suite's runs. Orderings need two seeds at least; closed-form facts must hold in every run."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import Any

from xutrain.report.published import Claim, Side
from xutrain.report.runs import Run
from xutrain.report.suite import Suite

#: runs of one cell by seed
CellRuns = dict[int, Run]


def value(run: Run, metric: str) -> float | None:
    """A number of one run.

    A final metric; ``bits_up``, ``bits_down``, ``bits_per_worker_step``; ``curve_mean:NAME``, the mean over what was logged; or
    ``reach:NAME:LEVEL:AXIS``, the value of AXIS (a logged metric, step or bits_up) where NAME first crosses LEVEL.
    """
    if metric.startswith("curve_mean:"):
        lines = run.curve(metric.partition(":")[2])
        return statistics.fmean(line["value"] for line in lines) if lines else None
    if metric.startswith("reach:"):
        _, name, level, axis = metric.split(":")
        return _reach(run, name, float(level), axis)
    return run.metrics.get(metric, run.bits.get(metric))


def _reach(run: Run, name: str, level: float, axis: str) -> float | None:
    """Where a curve first crosses a level, between two logged points by a straight line; None where it never does."""
    lines = [(axis_value(run, line, axis), float(line["value"])) for line in run.curve(name)]
    points = [(x, y) for x, y in lines if x is not None]
    for (x0, y0), (x1, y1) in pairwise(points):
        if (y0 - level) * (y1 - level) <= 0 and y0 != y1:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def axis_value(run: Run, line: dict[str, Any], axis: str) -> float | None:
    """The horizontal position of a line: one of its own keys, or another metric logged at the same step."""
    found = line.get(axis, run.at(line["step"], axis))
    return float(found) if isinstance(found, (int, float)) else None


def judge(
    claim: Claim, cells: dict[tuple[str, str], CellRuns], columns: list[str], suite: Suite, scale: str, smoke: bool
) -> dict[str, Any]:
    """The verdict on one claim: ``pass``, ``fail``, ``one seed``, ``smoke only`` or ``missing``, and the numbers behind it."""
    wanted = [claim.left.column] if claim.left.column else columns
    parts = [_part(claim, c, cells, suite) for c in wanted]
    known = [p for p in parts if p["verdict"] != "absent"]
    verdicts = [p["verdict"] for p in known]
    verdict = "missing" if not known else next((v for v in ("fail", "missing", "one seed") if v in verdicts), "pass")
    if smoke and verdict != "missing" and claim.kind != "exact":
        verdict = "smoke only"
    required = scale in claim.must_hold and not smoke
    return {
        "text": claim.text,
        "source": claim.source,
        "kind": claim.kind,
        "verdict": verdict,
        "required": required,
        "must_hold": list(claim.must_hold),
        "note": claim.note,
        "parts": known,
    }


def _part(claim: Claim, column: str, cells: dict[tuple[str, str], CellRuns], suite: Suite) -> dict[str, Any]:
    left = cells.get((claim.left.row, column))
    other = claim.right if isinstance(claim.right, Side) else None
    right = cells.get((other.row, other.column or column)) if other else None
    part: dict[str, Any] = {"column": column, "left": None, "right": None, "difference": None, "standard_error": None, "n": 0, "why": ""}
    if left is None or (other is not None and right is None):
        return {**part, "verdict": "absent"}
    ours = _values(left, claim.left, suite.metric_of(column))
    if other is not None and right is not None:
        theirs = _values(right, other, suite.metric_of(other.column or column))
    else:
        theirs = {s: float(claim.right) for s in ours}  # type: ignore[arg-type]
    seeds = sorted(ours.keys() & theirs.keys())
    if other is not None and right is not None and claim.left.metric is None and other.metric is None:
        gone = _diverged(claim, left, right, suite.better)
        if gone == "fail" or (gone == "pass" and len(seeds) < 2):
            names = [s.row if claim.left.row != other.row else f"{s.row}/{s.column or column}" for s in (claim.left, other)]
            return {**part, "verdict": gone, "n": len(left), "why": _who_diverged(dict(zip(names, (left, right), strict=True)))}
    if not seeds:
        return {**part, "verdict": "missing"}
    gaps = [ours[s] - theirs[s] for s in seeds]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    part.update(
        left=statistics.fmean(ours[s] for s in seeds),
        right=statistics.fmean(theirs[s] for s in seeds),
        difference=statistics.fmean(gaps),
        standard_error=error,
        n=len(seeds),
    )
    if claim.kind == "exact":
        return {**part, "verdict": "pass" if all(_holds(claim, gap) for gap in gaps) else "fail"}
    if len(seeds) < 2:
        return {**part, "verdict": "one seed"}
    return {**part, "verdict": "pass" if _holds(claim, statistics.fmean(gaps), (error or 0.0) * claim.sigma) else "fail"}


def _diverged(claim: Claim, left: CellRuns, right: CellRuns, better: str) -> str:
    """``pass`` where the side that should be behind diverged in two seeds at least and the other in none; ``fail`` the other way.

    An equality fails where one side diverged more often than the other.
    """
    ahead, behind = (left, right) if (claim.op.startswith(">")) == (better == "higher") else (right, left)
    lost = [sum(run.status == "diverged" for run in side.values()) for side in (ahead, behind)]
    if claim.op == "==":
        return "fail" if lost[0] != lost[1] else ""
    return "fail" if lost[0] > lost[1] else "pass" if lost[1] > 1 and not lost[0] and len(ahead) > 1 else ""


def _who_diverged(sides: dict[str, CellRuns]) -> str:
    lost = {row: sum(run.status == "diverged" for run in runs.values()) for row, runs in sides.items()}
    return ", ".join(f"{row} diverged in {lost[row]} of {len(runs)} seeds" for row, runs in sides.items() if lost[row])


def _values(runs: CellRuns, side: Side, default_metric: str) -> dict[int, float]:
    found = {seed: value(run, side.metric or default_metric) for seed, run in runs.items() if run.status == "done"}
    return {seed: v * side.times for seed, v in found.items() if v is not None}


def _holds(claim: Claim, gap: float, slack: float = 0.0) -> bool:
    """``gap`` is left - right; ``slack`` is what a strict ordering must exceed."""
    if claim.op == "==":
        return abs(gap) <= claim.margin
    upward = gap if claim.op.startswith(">") else -gap
    upward = upward - slack + claim.margin
    return upward >= 0 if claim.op.endswith("=") else upward > 0
