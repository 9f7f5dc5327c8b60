"""What every benchmark script writes with ``--json FILE``: one object of title, machine, rows and ratios.

    from results import Ratio, arguments, write            # scripts of this folder are run as files
    arguments(parser)                                       # adds --json FILE and --quick
    write(args.json, "Federated rounds", rows, [Ratio("CPU time, pfl / ours", 3.2, ">= 2")])

A row is a flat mapping of column name to text or number; rows of one table share their columns, and a row may name its table
under "table" (tables appear in the order of their first rows). A ratio states an aim as text that begins with >= or <= and a
number, and whether it is met follows from that; an aim without such a number (or "") is for reading only. ``why`` says the
reason where an aim is missed. Needs the standard library alone, so that peers' environments can import it too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_AIM = re.compile(r"^\s*(>=|<=|==)\s*([0-9.]+(?:e-?[0-9]+)?)")


@dataclass(frozen=True)
class Ratio:
    """One number that was aimed at. ``value`` None: could not be measured, ``why`` says why."""

    name: str
    value: float | None
    aim: str = ""
    why: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where nothing is aimed at or nothing was measured."""
        found = _AIM.match(self.aim)
        if found is None or self.value is None:
            return None
        sign, bound = found[1], float(found[2])
        if sign == "==":
            return abs(self.value - bound) <= 1e-9 * max(1.0, abs(bound))
        return self.value >= bound if sign == ">=" else self.value <= bound

    def plain(self) -> dict[str, Any]:
        value = {"name": self.name, "value": self.value, "aim": self.aim, "met": self.met}
        return value | ({"why": self.why} if self.why else {})


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every script has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="small and short: to see that the script works, not to quote")


def write(file: Path | None, title: str, rows: Sequence[Mapping[str, Any]], ratios: Sequence[Ratio] = (), **more: Any) -> None:
    """Write the object to ``file``; nothing where there is none. ``more``: further keys, such as notes (a list of sentences)."""
    if file is None:
        return
    value = {"title": title, "machine": machine(), "rows": list(rows), "ratios": [r.plain() for r in ratios], **more}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory, load and versions (of Python, torch, numpy and ``packages`` where they are installed)."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    if hasattr(os, "sysconf"):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    found |= {"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    for name in ("xutrain", "torch", "numpy", "numba", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def median(work: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of ``work`` by ``clock`` (time.process_time: what this process computed), after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)
