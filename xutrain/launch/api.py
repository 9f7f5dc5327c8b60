"""`xutrain.run`: the command line's result from Python."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xutrain.errors import Diverged, Failed, Issue, RecipeError
from xutrain.launch.plan import plan
from xutrain.launch.run import launch, summary
from xutrain.recipe import yamlfile
from xutrain.recipe.load import load


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    verb: str | None = None,
    seeds: list[int] | None = None,
    nproc: int = 1,
    smoke: bool = False,
    fresh: bool = False,
    out: str | Path = "runs",
    quiet: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Run a recipe and return the same result as ``xutrain VERB --json``.

    Args:
        recipe: a name (``"quantize/orq"``), a path, or a mapping with a ``verb`` key.
        verb: needed where a name belongs to several verbs, or a mapping has no ``verb``.
        seeds: several seeds give ``{"runs", "mean", "std"}``.
        nproc: processes; more than one start through torchrun.
        smoke, fresh, out: as the flags.
        quiet: no progress on stderr.
        overrides: recipe keys; sections as mappings (``train={"epochs": 3}``), dotted keys as ``**{"train.epochs": 3}``.

    Raises:
        RecipeError: the recipe or an override cannot be right.
        DataError, Diverged, Failed: the run did not end well.
    """
    texts = [f"{key}={json.dumps(value)}" for key, value in _flat(overrides)]
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, Mapping):
            path = Path(folder) / f"{recipe.get('name', 'recipe')}.yaml"
            path.write_text(yamlfile.dump({k: v for k, v in recipe.items() if k != "name"}), encoding="utf-8")
            recipe = path
        wanted = seeds if seeds is not None else [None]
        if len(set(wanted)) < len(wanted):
            raise RecipeError(Issue("seeds", "gives a seed twice, which would count one run as two samples", seeds))
        loaded = [load(str(recipe), verb, texts, smoke=smoke, seed=seed) for seed in wanted]
    results = [launch(plan(item, out=Path(out), nproc=nproc, fresh=fresh, verbosity=-1 if quiet else 0)) for item in loaded]
    for result in results:
        if result["exit_code"] not in (0, 75):
            _raise(result)
    return summary(results)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return flat


def _raise(result: dict[str, Any]) -> None:
    lines = [line.removeprefix("error: ") for line in result.get("error", []) if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in result.get("error", []) if line.startswith("hint: ")]
    kind = {2: RecipeError, 4: Diverged}.get(result["exit_code"], Failed)
    raise kind(Issue(result["run"], "; ".join(lines) or "failed", has_value=False, hint="; ".join(hints)))
