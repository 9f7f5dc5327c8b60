"""Pictures that runs left among their artefacts (overlays, schedules, searches), as a report shows them."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xutrain.report.runs import Run

KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
#: a report shows so many of one run, of one suite, and none larger than this
MOST_OF_RUN, MOST_OF_SUITE, LARGEST = 4, 12, 1 << 20


def of_run(run: Run) -> list[Path]:
    """The pictures of one run, by name."""
    folder = run.folder / "artefacts"
    if not folder.is_dir():
        return []
    found = (f for f in sorted(folder.iterdir()) if f.suffix in KINDS and f.is_file() and not f.is_symlink())
    return [f for f in found if f.stat().st_size <= LARGEST]


def of_cells(cells: Iterable[tuple[str, str, str, str, list[Run]]]) -> list[dict[str, Any]]:
    """Pictures of cells (row, column, their labels, runs): of the first finished seed of each, a few a cell, a dozen in all.

    Every cell shows its first picture before any shows its second. A run whose metrics fill several columns is shown once.
    """
    shown: set[Path] = set()
    queues: list[list[dict[str, Any]]] = []
    for row, column, row_label, column_label, runs in cells:
        done = [r for r in runs if r.status == "done"]
        if done and done[0].folder not in shown:
            shown.add(done[0].folder)
            where = f"{row_label}, {column_label}" if column_label else row_label
            head = {"row": row, "column": column, "seed": done[0].seed, "run": str(done[0].folder)}
            queues.append(
                [
                    {**head, "file": str(f), "caption": f"{where}: {f.stem.replace('-', ' ').replace('_', ' ')} (seed {done[0].seed})"}
                    for f in of_run(done[0])[:MOST_OF_RUN]
                ]
            )
    turns = [queue[i] for i in range(MOST_OF_RUN) for queue in queues if i < len(queue)]
    chosen = turns[:MOST_OF_SUITE]
    return [picture for queue in queues for picture in queue if picture in chosen]


def inline(file: str) -> str:
    """A picture as the address of an <img>; nothing where the file has gone."""
    path = Path(file)
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
    return f"data:{KINDS[path.suffix]};base64,{data}"
