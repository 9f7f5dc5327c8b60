"""Calibration sums on disk, so that another sparsity or pattern is cut without running the calibration again.

One safetensors file a layer with the vectors ``<expert>.<x|h>`` (or what else ``Statistics.state`` names) and token counts (routed,
and counted by the method): 19 MB for Mixtral-8x7B. Sums taken with ``propagate: dense`` do not depend on what was cut; sums taken
with ``propagate: pruned`` belong to the sparsity they saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.workers import Workers
from xutrain.errors import DataError, Issue, RecipeError
from xutrain.methods.prune.base import WeightMethod
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source, write_aside, write_checkpoint


def _check(method: WeightMethod, where: str) -> None:
    if method.statistics is None or not method.cacheable:
        name = method.options.name
        hint = "methods with cached sums: wanda, moe_pruner"
        raise RecipeError(Issue(where, "this method has no sums that are worth keeping", name, hint))


class SumsWriter:
    """Collects the sums of a layer's experts and writes them when the layer is done."""

    def __init__(self, folder: Path, arch: Architecture, method: WeightMethod, known: dict[str, Any]) -> None:
        _check(method, "save_sums")
        self.folder, self.arch, self.known = folder, arch, known
        self.held: dict[str, Tensor] = {}

    def add(self, expert: int, sums: dict[str, Tensor], tokens: int, counted: int) -> None:
        self.held |= {f"{expert}.{k}": v.cpu() for k, v in sums.items()}
        self.held[f"{expert}.tokens"] = torch.tensor([tokens, counted])

    def layer(self, index: int, workers: Workers) -> None:
        """Write one layer; the sums of all processes meet on the first."""
        held = {k: v.tolist() for k, v in self.held.items()} if workers.processes > 1 else {}
        everyone = workers.objects([held])
        if workers.rank == 0:
            for block in everyone[1:]:  # of the same dtypes as the first expert's, which is always here
                self.held |= {k: torch.tensor(v, dtype=self.held[f"0.{k.split('.')[1]}"].dtype) for k, v in block.items()}
            write_checkpoint(self.folder / f"layer-{index:04d}", dict(sorted(self.held.items())), {"layer": index})
        self.held = {}

    def finish(self) -> None:
        """Written last: what the sums belong to."""
        write_aside(self.folder / "sums.json", (json.dumps({**_model(self.arch), **self.known}, indent=1) + "\n").encode())


def _model(arch: Architecture) -> dict[str, Any]:
    """What a model must share with the one that sums were taken from."""
    return {"model_type": arch.family.model_type, **{k: getattr(arch, k) for k in ("layers", "experts", "hidden", "ffn")}}


class SumsReader:
    """Cached sums, expert by expert."""

    def __init__(self, folder: Path, arch: Architecture, method: WeightMethod) -> None:
        _check(method, "from_sums")
        self.folder = folder
        try:
            self.about = json.loads((folder / "sums.json").read_text(encoding="utf-8"))
            taken = dict(self.about["method"])
        except (OSError, ValueError, TypeError, KeyError) as reason:
            raise DataError(Issue(str(folder), f"holds no finished calibration sums: {reason!r}", has_value=False)) from None
        mine = _model(arch)
        if any(self.about.get(k) != v for k, v in mine.items()):
            raise DataError(Issue(str(folder), "the sums belong to another model", {k: self.about.get(k) for k in mine}))
        options = method.options.model_dump()
        if any(options.get(k) != taken.get(k) for k in {*options, *taken} - {"min_tokens"}):
            hint = f"cut with method {taken}"
            raise RecipeError(Issue("from_sums", "the sums were taken with another method", options, hint))

    def expert(self, layer: int, expert: int) -> tuple[dict[str, Tensor], int, int]:
        """The sums of one expert, the tokens routed to it, and those that the method counted."""
        source = Source(self.folder / f"layer-{layer:04d}")
        mine = {name.removeprefix(f"{expert}."): source.read(name) for name in source.entries if name.startswith(f"{expert}.")}
        tokens, counted = mine.pop("tokens").tolist()
        source.close()
        return mine, tokens, counted
