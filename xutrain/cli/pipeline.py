"""`xutrain pipeline plan | schedule | stragglers`: what a pipeline will cost, when its stages see a batch, what jitter does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan and look at pipelines; train with `xutrain pipeline --config dsp`.",
)
Config = Annotated[str, typer.Option("--config", "-c", metavar="NAME_OR_PATH", help="A recipe of `xutrain pipeline`.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command(epilog="Example: xutrain pipeline plan --config dsp --nproc 3")
def plan(
    config: Config = "dsp",
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes of the run to plan for.  [default: one a stage]", show_default=False)
    ] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Most megabytes of inputs that a stage may store.", show_default=False)] = None,
    longest: Annotated[
        int | None, typer.Option(help="Largest staleness m_0 to consider.", show_default="12, or the smallest valid one")
    ] = None,
    json: Json = False,
) -> None:
    """Measure layers and transfers on this machine; search cut points and (p, q) for the least predicted seconds per batch."""
    from xutrain.launch.plan import check_processes
    from xutrain.recipe.load import load

    recipe: Any = load(config, "pipeline", overrides or []).recipe
    processes = nproc or recipe.stages
    check_processes(recipe, processes)
    if recipe.method_name != "dsp":
        raise UsageError(Issue("method.name", "only DSP has delays to choose", recipe.method_name, "add method=dsp"))
    if memory_mb is not None and not 0 < memory_mb < float("inf"):
        raise UsageError(Issue("--memory-mb", "must be a number above 0", memory_mb))
    import torch

    from xutrain.loops.pipeline_plan import plan as search
    from xutrain.loops.pipeline_plan import steady_law

    torch.set_num_threads(recipe.threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = search(recipe, processes=processes, cores=cores, memory=None if memory_mb is None else int(memory_mb * 1e6), longest=longest)
    best = found["plan"]
    words = [
        f"split.cuts={best.bounds[1:-1]}",
        f"method.p={list(best.delays.p)}",
        f"method.m={list(best.delays.m)}",
        f"runtime.planned_s={best.seconds:.3g}",
    ]
    command = f"xutrain pipeline --config {config} --nproc {processes} " + " ".join(
        f"'{w.replace(' ', '')}'" for w in [*(overrides or []), *words]
    )
    if json:
        value = {
            "processes": processes,
            "cores": cores,
            **{name: {**p.as_dict(), "law_seconds": steady_law(p)} for name, p in found.items()},
            "command": command,
        }
        console.print_json(value)
        return
    own = found["recipe"]
    rows = [
        ["delays", *(f"DSP{p.delays}" for p in (own, best))],
        ["cuts", *(str(p.bounds[1:-1]) for p in (own, best))],
        ["stage ms", *(" ".join(f"{1000 * (f + b):.2f}" for f, b in zip(p.forward, p.backward, strict=True)) for p in (own, best))],
        ["message, processor ms", *(f"{1000 * p.message:.2f}" for p in (own, best))],
        ["message, on its way ms", *(f"{1000 * p.transfer:.2f}" for p in (own, best))],
        ["most stored MB", *(f"{max(p.stored) / 1e6:.2f}" for p in (own, best))],
        ["predicted ms a batch", *(f"{1000 * p.seconds:.2f}" for p in (own, best))],
    ]
    console.table(["", "recipe", "best found"], rows, f"{processes} process{'es' * (processes > 1)} on {cores} core{'s' * (cores > 1)}")
    if cores < processes:
        console.out.print(f"fewer cores than processes: no batch can take less than all stages' work / {cores}", markup=False)
    console.out.print(f"next: {command}", markup=False)


@app.command(epilog="Example: xutrain pipeline schedule --config dsp --picture schedule.svg")
def schedule(
    config: Config = "dsp",
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(min=1, max=200, help="Batches to show.")] = 8,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Also draw it (svg or png).", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Which batch every stage forwards (F) and goes backward on (B) in every tick: the paper's figure 2 for any delays."""
    from xutrain.recipe.load import load

    recipe: Any = load(config, "pipeline", overrides or []).recipe
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise UsageError(Issue("--picture", "must end in .svg or .png", str(picture)))
    from xutrain.loops.pipeline_ledger import draw, table

    delays = recipe.method.delays(recipe.stages)
    rows = table(delays, batches)
    if picture is not None:
        draw(delays, batches, picture)
    if json:
        console.print_json(
            {"delays": {"p": list(delays.p), "m": list(delays.m), "q": list(delays.q)}, "ticks": len(rows[0]), "stages": rows}
        )
        return
    cells = [[f"stage {k} (stale {delays.answers[k]})", *(_cell(*pair) for pair in row)] for k, row in enumerate(rows)]
    console.table(["tick", *map(str, range(len(rows[0])))], cells, f"{recipe.method_name}{delays}")


def _cell(forward: int | None, backward: int | None) -> str:
    return (
        " ".join(word for word in (f"F{forward}" if forward is not None else "", f"B{backward}" if backward is not None else "") if word)
        or "."
    )


@app.command(epilog="Example: xutrain pipeline stragglers --probability 0.3333")
def stragglers(
    stages: Annotated[int, typer.Option(min=2, max=64, help="Stages K.")] = 3,
    probability: Annotated[float, typer.Option(min=0, max=1, help="Chance that a stage is slowed in an iteration.")] = 1 / 3,
    iterations: Annotated[int, typer.Option(min=100, max=100_000, help="Iterations to simulate; 3 seeds.")] = 2000,
    json: Json = False,
) -> None:
    """Slow-down in percent by random stragglers, from the time model: longer queues absorb jitter."""
    from xutrain.methods.pipeline.timing import barrier_percent, slowdown_percent
    from xutrain.recipe.delays import dsp

    shapes = [dsp([q] * (stages - 1), [r] * (stages - 1), None, stages) for q, r in ((1, 1), (2, 1), (3, 2), (10, 10))]
    rows = []
    for s in (0.2, 0.5, 1.0, 1.5, 2.0):
        cells = [slowdown_percent(d, probability, s, iterations=iterations) for d in shapes]
        rows.append([f"{100 * s:.0f}%", *cells, barrier_percent(stages, probability, s), 100 * probability * s])
    columns = ["slow-down s", *(str(d) for d in shapes), "barrier", "limit"]
    if json:
        console.print_json({"probability": probability, "stages": stages, "columns": columns, "rows": rows})
        return
    columns[1:-2] = [f"m={','.join(map(str, d.m))}" for d in shapes]
    console.table(
        columns, rows, f"percent longer per batch for DSP of staleness m; probability {probability:.4g}, {iterations} iterations, 3 seeds"
    )
