"""Random-k: k = max(1, int(n / R)) distinct positions of each tensor, the same on all workers. A baseline.

    C(v) = v at the k positions, 0 elsewhere;   E||v - C(v)||^2 = (1 - k/n) ||v||^2
    rescale:  C(v) = (n/k) v there;             E||v - C(v)||^2 = (n/k - 1) ||v||^2

Contractive with k/n. ``rescale`` makes it unbiased (SAEF's GSpar with a fixed count); its relative error exceeds 1 where k < n/2, as
in every tensor of more than two elements for R > 2, and then error feedback diverges.

Limits: ratio 1 sends everything, with ``rescale`` or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.methods.codecs.shared import SharedSupport, check_ratio, flat_or_tensors
from xutrain.registry import Named, codec


@codec("random_k", summary="baseline: random positions of each tensor, the same on all workers: plain all-reduce, no indices")
class RandomK(SharedSupport):
    class Options(Named):
        name: str = "random_k"
        ratio: float = Field(64.0, ge=1, description="Compression ratio R: max(1, int(n / R)) positions are sent.")
        scope: Literal["tensor", "flat"] = Field("tensor", description="Positions of each tensor, or of the whole vector.")
        rescale: bool = Field(False, description="Multiply by n/k: unbiased, and unsound under error feedback where R > 2.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        if options.rescale:
            self.biased, self.contractive, self.expands = False, options.ratio == 1, options.ratio > 2

    @property
    def label(self) -> str:
        o = self.options
        return f"random-k-{o.ratio:g}" + ("" if o.scope == "tensor" else "-flat") + ("-rescaled" if o.rescale else "")

    def lay(self, layout: Sequence[Slice]) -> None:
        super().lay(layout)
        check_ratio(self, self.options.ratio, self.options.scope == "flat")

    def count(self, numel: int) -> int:
        """k of a tensor."""
        return max(1, int(numel / self.options.ratio))

    def draw(self, length: int, key: Key) -> Tensor:
        found = [
            start + torch.from_numpy(key.fold(stream=name).numpy().choice(n, self.count(n), replace=False))
            for name, start, n in flat_or_tensors(self, length)
        ]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def gain(self, length: int, device: torch.device) -> Tensor | None:
        if not self.options.rescale or not length:
            return None
        return torch.cat([torch.full((self.count(n),), n / self.count(n), device=device) for _, _, n in flat_or_tensors(self, length)])

    def payload_bits(self, length: int) -> int:
        return 32 * sum(self.count(n) for _, _, n in flat_or_tensors(self, length))
