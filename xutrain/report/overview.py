"""What stands at the head of a report: one line a suite, counts over all, and what ``--check`` does not forgive."""

from __future__ import annotations

from collections import Counter
from typing import Any

#: verdicts of cells that ``--check`` does not forgive
FAULTS = ("off", "ordering fails", "missing", "failed", "diverged")


def report(title: str, sections: list[dict[str, Any]]) -> dict[str, Any]:
    """The value that every format prints: title, counts, faults, a line a suite (``overview``), the suites themselves."""
    lines = [line(part) for part in sections]
    counted = ("cells", "done", "diverged", "claims", "held", "required", "required_held")
    return {
        "title": title,
        "count": {name: sum(known[name] for known in lines) for name in counted},
        "faults": faults(sections),
        "overview": lines,
        "suites": sections,
    }


def line(part: dict[str, Any]) -> dict[str, Any]:
    """A suite in numbers: cells, finished ones, those that diverged and may, verdicts; claims, and those that must hold here."""
    required = [c for c in part["claims"] if c["required"]]
    return {
        "suite": part["suite"],
        "group": part["group"],
        "title": part["title"],
        "paper": part["paper"]["title"],
        "cells": len(part["cells"]),
        "done": sum(c["status"] == "done" for c in part["cells"]),
        "diverged": sum(excused(c) and c["status"] != "done" for c in part["cells"]),
        "verdicts": dict(Counter(c["verdict"] for c in part["cells"] if c["verdict"])),
        "claims": len(part["claims"]),
        "held": sum(c["verdict"] == "pass" for c in part["claims"]),
        "required": len(required),
        "required_held": sum(c["verdict"] == "pass" for c in required),
        "faults": len(faults([part])),
    }


def faults(sections: list[dict[str, Any]]) -> list[str]:
    """What ``report --check`` fails for: cells and required claims that do not hold."""
    found = []
    for part in sections:
        found += [
            f"{part['suite']} {c['row']}/{c['column']}: {c['verdict']} ({c['why']})"
            for c in part["cells"]
            if c["verdict"] in FAULTS and not excused(c)
        ]
        found += [
            f"{part['suite']} {c['row']}/{c['column']}: seeds {c['missing_seeds']} are missing"
            for c in part["cells"]
            if c["n"] and c["missing_seeds"] and not excused(c)
        ]
        found += [f"claim {c['id']}: {c['verdict']}" for c in part["claims"] if c["required"] and c["verdict"] != "pass"]
    return found


def excused(cell: dict[str, Any]) -> bool:
    """Every seed that is missing diverged, and the suite allows it."""
    return bool(cell["may_diverge"]) and {r["status"] for r in cell["runs"]} <= {"done", "diverged"} and bool(cell["runs"])
