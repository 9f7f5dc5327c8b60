"""``xutrain data partition``: which client of a recipe holds how much of which class, as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.errors import Issue, UsageError

_SHOWN = 20  # classes that fit on a terminal line


def partition(
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="NAME_OR_PATH", help="A recipe of `xutrain federate`.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, such as partition.s=0.05", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the partition.  [default: the recipe's]", show_default=False)] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Also draw client x class (png, pdf or svg).", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Show how a federate recipe deals its training samples to clients."""
    if config is None:
        raise UsageError(
            Issue("--config", "is missing", has_value=False, hint="xutrain data partition --config domo.yaml partition.s=0.05")
        )
    if picture is not None and picture.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(Issue("--picture", "must end in .png, .pdf or .svg", str(picture), "for example --picture partition.png"))
    result = _table(config, overrides or [], seed)
    if picture is not None:
        import numpy as np

        from xutrain.data.partition_picture import draw

        if not result["classes"]:
            raise UsageError(Issue("--picture", "this data set has no classes to draw", str(picture), "leave --picture out"))
        title = f"{result['data']}, {result['rule']}, {len(result['clients'])} clients, mean distance {result['mean_distance']:.3f}"
        draw(np.array([row["counts"] for row in result["clients"]]), picture, title)
        result["picture"] = str(picture)
    typer.echo(json.dumps(result, indent=2) if as_json else _text(result))


def _table(config: str, overrides: list[str], seed: int | None) -> dict[str, Any]:
    from xutrain import registry
    from xutrain.data.partition import deal, distance, table
    from xutrain.engine.rng import Key
    from xutrain.loops.federated import samples_of
    from xutrain.recipe.load import load

    recipe: Any = load(config, "federate", overrides, seed=seed).recipe
    task = registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    rule = registry.load("partition", recipe.partition.name)
    samples = samples_of(task)
    parts = deal(rule, recipe.partition, samples, recipe.clients.count, task.num_classes, Key(recipe.seed, "partition").numpy())
    options = {k: v for k, v in recipe.partition.model_dump().items() if k != "name"}
    spelled = ", ".join(f"{k}={v}" for k, v in options.items())
    result: dict[str, Any] = {
        "data": recipe.data.name,
        "synthetic": bool(task.synthetic),
        "rule": f"{recipe.partition.name}({spelled})",
        "seed": recipe.seed,
        "samples": samples.count,
        "classes": task.num_classes if samples.labels is not None else 0,
        "mean_distance": None,
    }
    rows: list[dict[str, Any]] = [{"client": k, "samples": len(part)} for k, part in enumerate(parts)]
    if samples.labels is not None:
        counts = table(parts, samples.labels, task.num_classes)
        far = distance(counts)
        result["mean_distance"] = round(float(far.mean()), 6)
        for row, own, away in zip(rows, counts, far, strict=True):
            row.update(counts=own.tolist(), classes=int((own > 0).sum()), distance=round(float(away), 6))
    return {**result, "clients": rows}


def _text(result: dict[str, Any]) -> str:
    """The table for a terminal; wide label sets are summed up."""
    sizes = [row["samples"] for row in result["clients"]]
    made = " (synthetic)" if result["synthetic"] else ""
    lines = [f"{result['data']}{made}: {result['samples']} training samples, {result['rule']}, seed {result['seed']}"]
    counted = 0 < result["classes"] <= _SHOWN
    head = f"{'client':>6} {'samples':>8}"
    if result["classes"]:
        head += f" {'classes':>8} {'distance':>9}"
    if counted:
        head += "  | " + " ".join(f"{c:>5}" for c in range(result["classes"]))
    lines.append(head)
    for row in result["clients"]:
        line = f"{row['client']:>6} {row['samples']:>8}"
        if result["classes"]:
            line += f" {row['classes']:>8} {row['distance']:>9.3f}"
        if counted:
            line += "  | " + " ".join(f"{n or '.':>5}" for n in row["counts"])
        lines.append(line)
    lines.append(
        f"sizes {min(sizes)} to {max(sizes)}" + (f"; mean distance to the whole {result['mean_distance']:.3f}" if result["classes"] else "")
    )
    return "\n".join(lines + ([f"picture: {result['picture']}"] if "picture" in result else []))
