"""Shards of a common state, each kept by one worker: messages meet at the owners, results come back (ZeRO-1 style).

Worker j owns shard j. A shard's owner is to its shard what a server is to a whole vector, and bits are counted in that way:
up what the workers send to the owners, down what every worker receives back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.methods.codecs import packing
from xutrain.methods.codecs.base import Payload
from xutrain.methods.exchange import Exchange

_HEADER = 8  # bits that say how a shard's directions are written


class Owners:
    """The first ``shards`` of the exchange's workers own a contiguous part of a vector of ``length`` elements each."""

    def __init__(self, exchange: Exchange, length: int, shards: int) -> None:
        self.exchange, self.workers, self.length = exchange, exchange.workers, length
        assert 1 <= shards <= self.workers.count
        codec = exchange.codec
        if codec.shared_support or codec.collective or codec.per_tensor:
            hint = "method.shards=null, or a codec that works on any vector by itself, such as fp, orq or scaled_sign"
            raise RecipeError(Issue("method.shards", f"{codec.label} cannot be cut into shards", shards, hint))
        size = -(-length // shards)
        self.ranges = [(min(length, j * size), min(length, (j + 1) * size)) for j in range(self.workers.count)]
        self.hosted = [self.ranges[j] for j in self.workers.hosted]  # empty ranges for workers that own nothing
        self.scatters = self.exchange.ring and self.exchange.codec.dense and shards == self.workers.count

    def collect(self, vectors: Sequence[Tensor], key: Key, part: str, *, want_sent: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The mean of every hosted shard over all workers, and what each hosted worker's message decodes to."""
        codec, workers = self.exchange.codec, self.workers
        self.exchange.meter.add(part, self.up_bits)
        if self.exchange.ring and codec.dense:
            return self._summed(vectors), list(vectors) if want_sent else []
        rows, sent = [], []
        for worker, vector in zip(workers.hosted, vectors, strict=True):
            cuts = [(j, a, b) for j, (a, b) in enumerate(self.ranges) if b > a]
            payloads = {j: codec.encode(vector[a:b], key.fold(stream=f"shard{j}", worker=worker)) for j, a, b in cuts}
            rows.append([payloads[j].data if j in payloads else vector.new_empty(0, dtype=torch.uint8) for j in range(workers.count)])
            if want_sent:
                sent.append(torch.cat([codec.decode(payloads[j]) for j, _, _ in cuts]))
        received = self.exchange.scatter(rows, [self._payload(a, b) // 8 for a, b in self.ranges])
        return [self._average(received[j], *self.ranges[j], vectors[0]) for j in workers.hosted], sent

    def share(self, pieces: Sequence[Tensor], part: str) -> Tensor:
        """The whole float vector from every owner's piece, full precision."""
        self.exchange.meter.add(part, 0, self.float_bits)
        return torch.cat(self.workers.gather(list(pieces), sizes=[b - a for a, b in self.ranges]))

    def largest(self, vectors: Sequence[Tensor], part: str) -> Tensor:
        """Elementwise maximum of one vector of numbers >= 0 per hosted owner, over all owners; each sends its own to everyone."""
        kept = [v if b > a else v[:0] for v, (a, b) in zip(vectors, self.hosted, strict=True)]
        sizes = [len(vectors[0]) if b > a else 0 for a, b in self.ranges]
        self.exchange.meter.add(part, 0, self.largest_bits(len(vectors[0])))
        return torch.stack([v for v in self.workers.gather(kept, sizes=sizes) if len(v)]).amax(0)

    def share_directions(self, pieces: Sequence[Tensor], part: str, like: Tensor, *, zeros: bool) -> Tensor:
        """The whole vector of directions -1, 0, +1 from every owner's piece, without loss.

        With ``zeros`` a value takes a fifth of a byte. Else one bit, and a shard in which a zero turns up sends a second
        plane of bits that marks its zeros, counted as ``<part> zeros``.
        """
        base = 3 if zeros else 2
        packed, marks = [], []
        for piece in pieces:
            symbols = (piece + 1 if zeros else piece > 0).to(torch.uint8)
            vanished = piece == 0
            marked = not zeros and bool(vanished.any())
            header = symbols.new_tensor([int(marked)]) if piece.numel() else symbols[:0]
            packed.append(torch.cat([header, packing.pack(symbols, base)]) if piece.numel() else symbols)
            marks.append(packing.pack(vanished.to(torch.uint8), 2) if marked else symbols[:0])
        sizes = [self._direction_bytes(a, b, base) for a, b in self.ranges]
        everyone = self.workers.gather(packed, sizes=sizes)
        self.exchange.meter.add(part, 0, self.direction_bits(zeros=zeros))
        flags = [int(len(data) > 0 and int(data[0])) for data in everyone]
        planes = {}
        if any(flags):
            extra = [flag * packing.packed_bytes(2, b - a) for flag, (a, b) in zip(flags, self.ranges, strict=True)]
            planes = dict(enumerate(self.workers.gather(marks, sizes=extra)))
            self.exchange.meter.add(f"{part} zeros", 0, self.workers.count * 8 * sum(extra))
        out = torch.empty_like(like)
        for j, (a, b) in enumerate(self.ranges):
            if b > a:
                symbols = packing.unpack(everyone[j][1:], base, b - a).to(like.dtype)
                out[a:b] = symbols - 1 if zeros else symbols * 2 - 1
                if flags[j]:
                    out[a:b][packing.unpack(planes[j], 2, b - a).bool()] = 0
        return out

    @property
    def up_bits(self) -> int:
        """Bits that all workers send to the owners in one ``collect``."""
        return self.workers.count * sum(self._payload(a, b) for a, b in self.ranges)

    @property
    def float_bits(self) -> int:
        """Bits that all workers receive in one ``share``."""
        return self.workers.count * 32 * self.length

    def direction_bits(self, *, zeros: bool) -> int:
        """Bits that all workers receive in one ``share_directions`` without unforeseen zeros."""
        return self.workers.count * 8 * sum(self._direction_bytes(a, b, 3 if zeros else 2) for a, b in self.ranges)

    def largest_bits(self, length: int) -> int:
        """Bits that all workers receive in one ``largest`` of vectors of ``length`` elements."""
        return self.workers.count * 32 * length * sum(b > a for a, b in self.ranges)

    def _direction_bytes(self, start: int, stop: int, base: int) -> int:
        return packing.packed_bytes(base, stop - start) + _HEADER // 8 if stop > start else 0

    def _payload(self, start: int, stop: int) -> int:
        return self.exchange.codec.payload_bits(stop - start) if stop > start else 0

    def _average(self, received: Sequence[Tensor], start: int, stop: int, like: Tensor) -> Tensor:
        if stop == start:
            return like[:0]
        total: Tensor | None = None
        for data in received:
            decoded = self.exchange.codec.decode(Payload(data, stop - start))
            total = decoded.clone() if total is None else total.add_(decoded)
        assert total is not None
        return self.exchange.codec.combine(total.div_(self.workers.count))

    def _summed(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Plain numbers by reduce-scatter where all workers own equal parts, else by all-reduce."""
        if not self.scatters:
            whole = self.workers.mean(vectors)
            return [whole[a:b] for a, b in self.hosted]
        size = -(-self.length // self.workers.count)
        padding = size * self.workers.count - self.length
        padded = [torch.nn.functional.pad(v, (0, padding)) for v in vectors]
        block = self.workers.reduce_scatter(padded).div_(self.workers.count)
        return [piece[: b - a] for piece, (a, b) in zip(block.split(size), self.hosted, strict=True)]
