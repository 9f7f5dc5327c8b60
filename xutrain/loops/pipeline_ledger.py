"""The staleness ledger: which version of a stage's weights every gradient met, held against the preset and drawn."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from xutrain.engine.record import Record, write_json
from xutrain.loops.pipeline_job import Job
from xutrain.methods.pipeline.base import Applied, Stage
from xutrain.recipe.delays import Delays

SHOWN = 64  # batches whose lines are kept for the table and the picture


class Ledger:
    """Counts the measured staleness of the hosted stages and keeps the first lines."""

    def __init__(self, delays: Delays) -> None:
        self.delays = delays
        self.counts: dict[int, Counter[int]] = {}
        self.lines: list[Applied] = []

    def take(self, stage: Stage, start: int) -> None:
        """Move the stage's new lines here; every one must be what the delays preset.

        ``start`` is the first batch since the queues last were empty: before batch start + m_k, the versions that a
        stage skipped are those that exist, b - start.
        """
        for line in stage.applied:
            preset = self.delays.answers[line.stage]
            assert line.forward_version == max(start, line.batch - preset), (
                f"stage {line.stage} forwarded batch {line.batch} at version {line.forward_version}"
            )
            assert line.applied_to == line.batch, f"stage {line.stage} applied batch {line.batch} at version {line.applied_to}"
            counts = self.counts.setdefault(line.stage, Counter())
            counts[line.applied_to - line.forward_version] += 1
            if line.batch < SHOWN:
                self.lines.append(line)
        stage.applied = []

    def state(self, stage: int) -> dict[str, Any]:
        """What is known of a stage, for a checkpoint: a resumed run writes the table of the whole."""
        return {"counts": dict(self.counts.get(stage, {})), "lines": [_row(line) for line in self.lines if line.stage == stage]}

    def load_state(self, stage: int, state: dict[str, Any]) -> None:
        """Undo ``state``."""
        self.counts[stage] = Counter(state["counts"])
        self.lines += [Applied(*row) for row in state["lines"]]

    def write(self, job: Job, record: Record, batches: int, seconds: float) -> None:
        """Gather all stages' counts and write the table, the picture and pipeline.json into the run's artefacts."""
        mine = [(*self.state(s.index).values(), s.most_kept) for s in job.stages]
        everyone = job.workers.objects(mine)
        if not job.ctx.is_main:
            return
        d = job.method.delays
        summary: dict[str, Any] = {
            "delays": {"p": list(d.p), "m": list(d.m), "q": list(d.q)},
            "staleness": {f"stage {k}": {str(s): n for s, n in sorted(counts.items())} for k, (counts, _, _) in enumerate(everyone)},
            "most_kept": [kept for _, _, kept in everyone],
            "layers_per_stage": [b - a for a, b in zip(job.bounds, job.bounds[1:], strict=False)],
            "boundary_bits_per_batch": [m.bits for m in job.messages],
            "seconds_per_batch": seconds / batches if batches else None,
            "processes": job.ctx.processes,
        }
        planned = job.recipe.runtime.planned_s
        if planned is not None:
            summary["planned_seconds_per_batch"] = planned
            record.note(f"seconds per batch: planned {planned:.5f}, measured {seconds / max(1, batches):.5f}")
        write_json(record.artefact("pipeline.json"), summary)
        rows = [row for _, lines, _ in everyone for row in lines]
        with record.artefact("staleness.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["stage", "batch", "forward_version", "backward_version", "applied_to"])
            table.writerows(rows)
        if rows and job.method.flush is None:
            draw(job.method.delays, min(job.steps, 12), record.artefact("schedule.svg"))


def _row(line: Applied) -> list[int]:
    return [line.stage, line.batch, line.forward_version, line.backward_version, line.applied_to]


def table(delays: Delays, batches: int) -> list[list[tuple[int | None, int | None]]]:
    """For every stage and tick: the batch that goes forward and the one that goes backward (None: none)."""

    def at(index: int) -> int | None:
        return index if 0 <= index < batches else None

    ticks = range(delays.drained(batches))
    return [[(at(n - delays.lags[k]), at(n - delays.lags[k] - delays.answers[k])) for n in ticks] for k in range(delays.stages)]


def draw(delays: Delays, batches: int, path: Path) -> None:
    """The paper's figure 2 from data: a grid of ticks and stages, forward above backward, one colour per batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = table(delays, batches)
    ticks = len(rows[0])
    figure = Figure(figsize=(max(4.0, 0.42 * ticks + 1), 0.9 * delays.stages + 1))
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    axes = figure.add_subplot()
    for k, row in enumerate(rows):
        y = delays.stages - 1 - k
        for n, pair in enumerate(row):
            for half, batch in enumerate(pair):
                if batch is not None:
                    colour = f"C{batch % 10}"
                    axes.add_patch(Rectangle((n, y + (0.45 if half == 0 else 0.05)), 0.95, 0.38, color=colour, alpha=1.0 if half else 0.55))
                    axes.text(
                        n + 0.47, y + (0.64 if half == 0 else 0.24), f"{'BF'[half == 0]}{batch}", ha="center", va="center", fontsize=6
                    )
    axes.set_xlim(0, ticks)
    axes.set_ylim(0, delays.stages)
    axes.set_yticks(
        [delays.stages - 1 - k + 0.45 for k in range(delays.stages)],
        [f"stage {k}\nstale {delays.answers[k]}" for k in range(delays.stages)],
        fontsize=7,
    )
    axes.set_xlabel("tick")
    axes.set_title(f"DSP{delays}: F forward, B backward, one colour per batch", fontsize=8)
    figure.savefig(path, bbox_inches="tight")
