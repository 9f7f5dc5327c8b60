"""Run folders made by hand through the real writers: a plan, a record, a sealed state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xutrain.engine.meter import BitMeter
from xutrain.engine.record import Record, metrics_digest, result_digest
from xutrain.launch import sweep
from xutrain.launch.plan import bits_summary
from xutrain.report import suite

SUITE = """
summary: A small table
title: {title}
paper: "2002.11082"
metric: test_accuracy
better: higher
show: [test_loss]
recipe: quantize/orq
seeds: [0, 1]
rows:
  fp: {{label: full, set: {{codec: fp}}}}
  orq3: {{label: "ORQ-3", set: {{codec: {{name: orq, levels: 3}}}}}}
columns:
  digits: {{label: digits, set: {{train.steps: 3}}}}
plots:
  - {{y: test_accuracy, x: bits, log_x: true}}
  - {{y: test_accuracy, x: test_loss, kind: points}}
scales:
  cpu: {{}}
"""

Fill = Callable[..., suite.Table]


@pytest.fixture
def suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite file outside the catalogue; the current folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE.format(title="Mine"), encoding="utf-8")
    return path


def finish(job: sweep.Job, accuracy: float, *, bits: int = 1000) -> Path:
    """Write the folder of a finished run: two evaluations, then the sealed result."""
    job.plan.write()
    meter = BitMeter()
    record = Record(job.plan.folder, meter, seed=job.seed)
    for step, value in ((1, accuracy / 2), (3, accuracy)):
        meter.add("gradient", up=bits, down=bits)
        record.log(step, {"test_accuracy": value, "test_loss": 1 - value}, epoch=float(step))
    record.close()
    head = {**job.plan.describe(), "status": "done", "scale": job.plan.recipe.scale}
    result = {
        **head,
        "metrics": {"test_accuracy": accuracy, "test_loss": 1 - accuracy},
        "bits": bits_summary(2 * bits, 2 * bits, 4, 3),
        "wall_s": 1.0,
    }
    sums = {"metrics_sha256": metrics_digest(job.plan.folder), "result_sha256": result_digest(result)}
    record.state("done", exit_code=0, result=result, step=3, **sums)
    return job.plan.folder


@pytest.fixture
def fill(suite_file: Path, runs: Path) -> Fill:
    """``fill({"fp": [...], "orq3": [...]})``: finished runs with these accuracies, one a seed; returns the table."""

    def make(values: dict[str, list[float]], name: str | None = None, **kwargs: object) -> suite.Table:
        seeds = list(range(max((len(v) for v in values.values()), default=2)))
        table = suite.open_table(name or str(suite_file), seeds=seeds, **kwargs)  # type: ignore[arg-type]
        jobs = sweep.prepare(table, out=runs)
        for job in jobs:
            known = values.get(job.cell.row, [])
            if job.seed < len(known):
                finish(job, known[job.seed])
        sweep.write_manifest(table, jobs, runs)
        return table

    return make
