"""What people read: tables on stdout, messages on stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from xutrain.errors import Issue
from xutrain.launch.run import dump

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Exactly one JSON document on stdout."""
    sys.stdout.write(dump(value) + "\n")


def print_issues(issues: list[Issue]) -> None:
    for issue in issues:
        for line in issue.lines():
            head, _, rest = line.partition(": ")
            err.print(f"[bold {'red' if head == 'error' else 'cyan'}]{head}:[/] ", end="")
            err.print(rest, markup=False)


def table(columns: list[str], rows: list[list[Any]], title: str | None = None, *, wrap: bool = True) -> None:
    """A plain table; numbers are shortened to four significant digits. Without ``wrap``, and in a pipe, a row stays one line."""
    wrap = wrap and out.is_terminal
    view = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        view.add_column(column, no_wrap=not wrap, overflow="fold")
    for row in rows:
        view.add_row(*(show(v) for v in row))
    page = out if wrap else Console(width=max(out.width, 400), soft_wrap=True, highlight=False)
    page.print(view)


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def bits(value: float | None) -> str:
    """Bits with a binary-free unit: 3.2 Mbit."""
    if value is None:
        return "-"
    for unit, size in (("Tbit", 1e12), ("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} bit"


def print_result(summary: dict[str, Any]) -> None:
    """The end of a run: its numbers, its folder, and what to do next."""
    runs = summary.get("runs", [summary])
    first = runs[0]
    what = f"{first['verb']}/{first['recipe']}  method {first['method']}" + (f"  codec {first['codec']}" if first["codec"] else "")
    label = {"smoke": "  (smoke run: says that it works, not how well)", "cpu": "", "paper": ""}[first["scale"]]
    out.print(f"{what}{label}", markup=False)
    if len(runs) > 1:
        names = list(summary["mean"])
        rows = [[n, f"{summary['mean'][n]:.4g} ± {summary['std'][n]:.2g}", *(r["metrics"].get(n) for r in runs)] for n in names]
        table(["metric", f"mean ± std (n={len(runs)})", *(f"seed {r['seed']}" for r in runs)], rows)
    elif first["metrics"]:
        table(["metric", "value"], [[n, v] for n, v in first["metrics"].items()])
    for run in runs:
        out.print(
            f"status {run['status']}   sent {bits(run['bits']['up'])}   received {bits(run['bits']['down'])}"
            f"   per worker and step {bits(run['bits']['per_worker_step'])}   {run['wall_s']:.1f} s",
            markup=False,
        )
        out.print(f"run folder: {run['run']}", markup=False)
        for line in run.get("error", []):
            err.print(line, markup=False)
    if first["status"] == "stopped":
        err.print("hint: the same command goes on from the checkpoint", markup=False)
