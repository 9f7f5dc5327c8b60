"""Two runs step by step: the first step and tensor where they part. Both save every step and stop after as many as asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xutrain.engine.record import read_metrics
from xutrain.errors import Failed, Issue
from xutrain.launch.plan import plan
from xutrain.launch.run import launch
from xutrain.recipe.load import load


def traced(config: str, verb: str | None, overrides: list[str], *, steps: int, out: Path, nproc: int = 1, smoke: bool = True) -> Path:
    """Run a recipe for ``steps`` steps (rounds, events, layers) with a checkpoint at each; returns the run folder.

    Raises:
        RecipeError, UsageError: the recipe cannot be right. Failed: the run did not end well.
    """
    keep = [*overrides, "checkpoint.every=1", f"checkpoint.keep={steps + 1}", "log.wandb=disabled", "log.tensorboard=false"]
    prepared = plan(load(config, verb, keep, smoke=smoke), out=out, nproc=nproc, verbosity=-1)
    prepared.folder.mkdir(parents=True)
    (prepared.folder / "STOP").write_text(f"{steps}\n", encoding="utf-8")
    result = launch(prepared)
    if result["exit_code"] not in (0, 75):
        told = "; ".join(line.removeprefix("error: ") for line in result.get("error", []) if line.startswith("error: "))
        raise Failed(Issue(f"{config} on {nproc} process{'es' if nproc > 1 else ''}", told or result["status"], has_value=False))
    return prepared.folder


def first_difference(first: Path, second: Path) -> dict[str, Any] | None:
    """Where two traced runs part first: {"step", "tensor", "first", "second", "largest"}; None where they are bit-equal.

    Compares every checkpoint (model, shared state, workers' states), then the recorded metrics, then other tensor files.
    """
    ours, theirs = _steps(first), _steps(second)
    for step in sorted(set(ours) | set(theirs)):
        if step not in ours or step not in theirs:
            return _row(step, "checkpoint", *("saved" if step in side else "not saved" for side in (ours, theirs)))
        if found := _in_values(step, _state(ours[step]), _state(theirs[step])):
            return found
    if found := _in_values(None, _metrics(first), _metrics(second)):
        return found
    return _in_values(None, _files(first), _files(second))


def compared(first: Path, second: Path) -> int:
    """How many steps both runs saved."""
    return len(set(_steps(first)) & set(_steps(second)))


def _steps(folder: Path) -> dict[int, Path]:
    return {int(p.name.split("-")[1]): p for p in (folder / "checkpoints").glob("step-*")}


def _state(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint, the model first: it is what a reader knows by name."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    if (checkpoint / "model.safetensors").is_file():
        found.update({f"model {n}": t for n, t in sorted(load_file(checkpoint / "model.safetensors").items())})
    for path in sorted(checkpoint.glob("*.pt")):
        found.update(_flat(path.stem, torch.load(path, map_location="cpu", weights_only=True)))
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name} {key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flat(f"{name}[{index}]", item)
    else:
        yield name, value


def _metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in read_metrics(folder):
        tags = [
            f"{k}={v}"
            for k, v in line.items()
            if k not in ("step", "name", "value", "bits_up", "bits_down", "wall_s", "seed", "split", "epoch")
        ]
        found[f"step {line['step']} metric {line['split']} {line['name']} {' '.join(tags)}".strip()] = (
            line["value"],
            line["bits_up"],
            line["bits_down"],
        )
    return found


def _files(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    paths = [p for p in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in p.relative_to(folder).parts]
    return {f"{p.relative_to(folder)} {n}": t for p in paths for n, t in load_file(p).items()}


def _in_values(step: int | None, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any] | None:
    import torch

    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if name not in ours or name not in theirs:
            return _row(step, name, *("there" if name in side else "absent" for side in (ours, theirs)))
        a, b = ours[name], theirs[name]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return _row(step, name, *(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (a, b)))
            if not torch.equal(a, b) and not torch.equal(torch.nan_to_num(a.double(), 7e300), torch.nan_to_num(b.double(), 7e300)):
                gap = (a.double() - b.double()).abs().flatten()
                at = int(torch.nan_to_num(gap, float("inf")).argmax())
                row = _row(step, name, a.flatten()[at].item(), b.flatten()[at].item())
                return {**row, "index": at, "elements": int((gap != 0).sum()), "of": a.numel(), "largest": _finite(gap[at].item())}
        elif a != b and not (a != a and b != b):
            return _row(step, name, a, b)
    return None


def _row(step: int | None, name: str, first: Any, second: Any) -> dict[str, Any]:
    shown = [v if isinstance(v, (int, str, bool)) or v is None else _finite(v) if isinstance(v, float) else str(v) for v in (first, second)]
    return {"step": step, "tensor": name, "first": shown[0], "second": shown[1]}


def _finite(value: float) -> float | str:
    return value if value == value and abs(value) != float("inf") else str(value)


def sentence(found: dict[str, Any]) -> str:
    """A difference in words."""
    where = f"step {found['step']}, {found['tensor']}" if found["step"] is not None else str(found["tensor"])
    more = f"; element {found['index']}, the largest of {found['elements']} of {found['of']} that differ" if "index" in found else ""
    return f"they part at {where}: {found['first']} and {found['second']}{more}"
