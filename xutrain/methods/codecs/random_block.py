"""Random blocks: every worker sends the same contiguous part of each tensor (arXiv 2004.05298, RBGS).

    n elements, b = max(1, int(n / R)), start uniform in 0 .. n-1, block = start .. start+b-1 cyclically
    C(v) = v on the block, 0 elsewhere;   E||v - C(v)||^2 = (1 - b/n) ||v||^2

No factor 1 / probability; the expectation over the start is exact. ``scope``: tensor is the authors' URSB; flat cuts one block from
the whole vector; grid cuts a rectangle from every matrix (their GRSB, whose last blocks are truncated; here they wrap around, so
that every message has the same size). ``balanced`` sends the blocks in a random order instead, each once.

Limits: ratio 1 sends everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.methods.codecs.shared import SharedSupport, check_ratio
from xutrain.registry import Named, codec


class Part(NamedTuple):
    """A matrix of rows x columns at ``start`` of the vector, and the block's height and width."""

    name: str
    start: int
    rows: int
    columns: int
    height: int
    width: int


@codec("random_block", paper="2004.05298", summary="one random block per tensor, the same on all workers: plain all-reduce, no indices")
class RandomBlock(SharedSupport):
    class Options(Named):
        name: str = "random_block"
        ratio: float = Field(64.0, ge=1, description="Compression ratio R: a block has max(1, int(n / R)) elements.")
        scope: Literal["tensor", "flat", "grid"] = Field(
            "tensor", description="One block per tensor, one for the whole vector, or a rectangle per matrix."
        )
        balanced: bool = Field(
            False,
            description="Blocks in a random order, each once: of B = ceil(n / b) blocks each is sent within 2B - 1 exchanges.",
        )

    _parts_length = -1
    _parts_of: Sequence[Slice] = ()

    @property
    def label(self) -> str:
        o = self.options
        return f"random-block-{o.ratio:g}" + ("" if o.scope == "tensor" else f"-{o.scope}") + ("-balanced" if o.balanced else "")

    def lay(self, layout: Sequence[Slice]) -> None:
        super().lay(layout)
        check_ratio(self, self.options.ratio, self.options.scope == "flat")

    def parts(self, length: int) -> list[Part]:
        """What is cut, in the order of the tensors."""
        if self._parts_length != length or self._parts_of is not self.layout:
            self._parts_length, self._parts_of = length, self.layout
            self._parts = [
                self._part(p)
                for p in ([Slice("", (length,), 0, length)] if self.options.scope == "flat" else self.tensors(length))
                if p.numel
            ]
            sizes = np.array([p.height * p.width for p in self._parts], dtype=np.int64)
            self._owner = np.repeat(np.arange(len(sizes)), sizes)
            inner = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            wide = np.array([p.width for p in self._parts], dtype=np.int64)[self._owner]
            self._row, self._column = inner // wide, inner % wide
            self._start, self._rows, self._columns = (
                np.array([getattr(p, f) for p in self._parts], dtype=np.int64)[self._owner] for f in ("start", "rows", "columns")
            )
            self._permutations: dict[int, tuple[int, np.ndarray]] = {}
        return self._parts

    def _part(self, part: Slice) -> Part:
        ratio, n = self.options.ratio, part.numel
        if self.options.scope == "grid" and len(part.shape) >= 2:
            rows, columns, r = part.shape[0], n // part.shape[0], int(ratio)
            across = 2 ** (int(math.log2(r)) // 2)  # r1 = 2^int(log2(r) / 2), r2 = r // r1
            return Part(part.name, part.start, rows, columns, max(1, round(rows / across)), max(1, round(columns / (r // across))))
        return Part(part.name, part.start, 1, n, 1, max(1, int(n / ratio)))

    def draw(self, length: int, key: Key) -> Tensor:
        parts = self.parts(length)
        origins = np.array([self._origin(i, p, key) for i, p in enumerate(parts)], dtype=np.int64).reshape(-1, 2)[self._owner]
        rows, columns = (origins[:, 0] + self._row) % self._rows, (origins[:, 1] + self._column) % self._columns
        return torch.from_numpy(self._start + rows * self._columns + columns)

    def _origin(self, index: int, part: Part, key: Key) -> tuple[int, int]:
        """Upper left corner of a part's block. The key holds the tensor's name: how tensors are grouped changes no draw."""
        if not self.options.balanced:
            return divmod(key.fold(stream=part.name).integer % (part.rows * part.columns), part.columns)
        down, across = -(-part.rows // part.height), -(-part.columns // part.width)
        cycle, at = divmod(key.step, down * across)
        if self._permutations.get(index, (-1,))[0] != (key.seed, cycle):
            order = key.fold(stream=f"order/{part.name}", step=cycle).numpy().permutation(down * across)
            self._permutations[index] = ((key.seed, cycle), order)  # type: ignore[assignment]
        row, column = divmod(int(self._permutations[index][1][at]), across)
        return row * part.height, column * part.width

    def payload_bits(self, length: int) -> int:
        return 32 * sum(p.height * p.width for p in self.parts(length))
