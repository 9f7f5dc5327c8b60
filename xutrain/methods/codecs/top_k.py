"""Top-k: the k = max(1, int(n / R)) largest magnitudes of each tensor, with their positions. A baseline.

    C(v)_i = v_i where |v_i| is among the k largest, else 0;   ||v - C(v)||^2 <= (1 - k/n) ||v||^2

Wire: the values in order of position, float32, then the positions, ceil(log2 n) bits each (none where k = n), as one packed
stream. Ties go to the lower position.

Limits: ratio 1 sends everything; a tensor with at most k elements other than 0 comes back exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.methods.codecs import packing
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.methods.codecs.shared import check_ratio, flat_or_tensors
from xutrain.registry import Named, codec


class Part(NamedTuple):
    """A tensor: where it starts, its elements, how many are sent, bits of a position, and where its values and bits stand."""

    start: int
    numel: int
    k: int
    width: int
    value: int
    bit: int


@codec("top_k", summary="baseline: the largest magnitudes of each tensor with packed positions")
class TopK(Codec):
    biased = True
    contractive = True
    per_tensor = True

    class Options(Named):
        name: str = "top_k"
        ratio: float = Field(20.0, ge=1, description="k = max(1, int(n / ratio)) of n elements are sent; 20 is the largest 5 %.")
        scope: Literal["tensor", "flat"] = Field("tensor", description="The largest of each tensor, or of the whole vector.")

    @property
    def label(self) -> str:
        return f"top-k-{self.options.ratio:g}" + ("" if self.options.scope == "tensor" else "-flat")

    def lay(self, layout: Sequence[Slice]) -> None:
        super().lay(layout)
        check_ratio(self, self.options.ratio, self.options.scope == "flat")

    def _parts(self, length: int) -> Iterator[Part]:
        value = bit = 0
        for _, start, n in flat_or_tensors(self, length):
            k = max(1, int(n / self.options.ratio))
            width = (n - 1).bit_length() if k < n else 0
            yield Part(start, n, k, width, value, bit)
            value, bit = value + k, bit + k * width

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        vector = as_vector(vector)
        check_finite(vector, max(1, vector.numel()))
        parts = list(self._parts(vector.numel()))
        if not parts:
            return Payload(vector.new_empty(0, dtype=torch.uint8), 0)
        chosen = [_largest(vector[p.start : p.start + p.numel], p.k) for p in parts]
        values = torch.cat([vector[p.start : p.start + p.numel][at] for p, at in zip(parts, chosen, strict=True)])
        bits = torch.cat([_to_bits(at, p.width) for p, at in zip(parts, chosen, strict=True)])
        return Payload(torch.cat([values.view(torch.uint8), packing.pack(bits, 2)]), vector.numel())

    def decode(self, payload: Payload) -> Tensor:
        data = self.received(payload)
        out = torch.zeros(payload.length, device=data.device)
        parts = list(self._parts(payload.length))
        if not parts:
            return out
        count, total = parts[-1].value + parts[-1].k, parts[-1].bit + parts[-1].k * parts[-1].width
        values = data[: 4 * count].view(torch.float32)
        bits = packing.unpack(data[4 * count :], 2, total)
        for p in parts:
            mine = values[p.value : p.value + p.k]
            at = _from_bits(bits[p.bit : p.bit + p.k * p.width], p.k, p.width)
            out[p.start + at] = mine
        return out

    def payload_bits(self, length: int) -> int:
        parts = list(self._parts(length))
        return 32 * sum(p.k for p in parts) + 8 * packing.packed_bytes(2, sum(p.k * p.width for p in parts))


def _largest(vector: Tensor, k: int) -> Tensor:
    """Positions of the k largest magnitudes, ascending; the lower position among equals."""
    if k == vector.numel():
        return torch.arange(k, device=vector.device)
    size = vector.abs()
    bound = torch.topk(size, k, sorted=False).values.amin()
    above = torch.nonzero(size > bound).view(-1)
    equal = torch.nonzero(size == bound).view(-1)[: k - len(above)]
    return torch.cat((above, equal)).sort().values


def _to_bits(positions: Tensor, width: int) -> Tensor:
    """uint8 zeros and ones of shape (k * width,), lowest bit first."""
    if not width:
        return torch.empty(0, dtype=torch.uint8, device=positions.device)
    places = torch.arange(width, device=positions.device)
    return ((positions.unsqueeze(1) >> places) & 1).to(torch.uint8).view(-1)


def _from_bits(bits: Tensor, k: int, width: int) -> Tensor:
    if not width:
        return torch.arange(k, device=bits.device)
    weights = 1 << torch.arange(width, device=bits.device)
    return (bits.view(k, width).long() * weights).sum(1)
