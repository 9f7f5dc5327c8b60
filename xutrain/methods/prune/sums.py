"""Calibration sums on disk, so that another sparsity or pattern is cut without running the calibration again.

One safetensors file a layer with the vectors ``<expert>.<x|h>`` and token counts: 19 MB for Mixtral-8x7B. Sums taken with
``propagate: dense`` do not depend on what was cut; sums taken with ``propagate: pruned`` belong to the sparsity they saw.
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

    def add(self, expert: int, sums: dict[str, Tensor], tokens: int) -> None:
        self.held |= {f"{expert}.{k}": v.cpu().float() for k, v in sums.items()}
        self.held[f"{expert}.tokens"] = torch.tensor([tokens])

    def layer(self, index: int, workers: Workers) -> None:
        """Write one layer; the sums of all processes meet on the first."""
        held = {k: v.tolist() for k, v in self.held.items()} if workers.processes > 1 else {}
        everyone = workers.objects([held])
        if workers.rank == 0:
            for block in everyone[1:]:
                self.held |= {k: torch.tensor(v, dtype=torch.int64 if k.endswith("tokens") else torch.float32) for k, v in block.items()}
            write_checkpoint(self.folder / f"layer-{index:04d}", dict(sorted(self.held.items())), {"layer": index})
        self.held = {}

    def finish(self) -> None:
        """Written last: what the sums belong to."""
        about = {"model_type": self.arch.family.model_type, "layers": self.arch.layers, "experts": self.arch.experts, **self.known}
        write_aside(self.folder / "sums.json", (json.dumps(about, indent=1) + "\n").encode())


class SumsReader:
    """Cached sums, expert by expert."""

    def __init__(self, folder: Path, arch: Architecture, method: WeightMethod) -> None:
        _check(method, "from_sums")
        self.folder = folder
        try:
            self.about = json.loads((folder / "sums.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as reason:
            raise DataError(Issue(str(folder), f"holds no finished calibration sums: {reason}", has_value=False)) from None
        mine = {"model_type": arch.family.model_type, "layers": arch.layers, "experts": arch.experts}
        if any(self.about.get(k) != v for k, v in mine.items()):
            raise DataError(Issue(str(folder), "the sums belong to another model", {k: self.about.get(k) for k in mine}))
        gate, taken = (m.get("gate") for m in (method.options.model_dump(), self.about["method"]))
        if self.about["method"]["name"] != method.options.name or gate != taken:
            hint = f"cut with method {self.about['method']}"
            raise RecipeError(Issue("from_sums", "the sums were taken with another method", method.options.model_dump(), hint))

    def expert(self, layer: int, expert: int) -> tuple[dict[str, Tensor], int]:
        source = Source(self.folder / f"layer-{layer:04d}")
        sums = {key: source.read(f"{expert}.{key}") for key in ("x", "h")}
        tokens = int(source.read(f"{expert}.tokens")[0])
        source.close()
        return sums, tokens
