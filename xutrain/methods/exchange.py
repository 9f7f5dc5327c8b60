"""How N workers' vectors become one mean through a codec, and what that costs. The only caller of the meter in data-parallel runs.

What crosses a process boundary is the encoded payload. With P < N processes the workers of one process exchange in memory
by the same path, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xutrain.engine.meter import BitMeter
from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.errors import Issue, RecipeError
from xutrain.methods.codecs.base import Codec, Payload


@dataclass
class Result:
    """What an exchange returns: the mean, and what each hosted worker's own message decodes to (error feedback needs it)."""

    mean: Tensor
    sent: list[Tensor]


class Exchange:
    """Averages one float32 vector per hosted worker.

    Modes (b = bits of a payload of the whole vector, K workers, D elements):
        allgather: every worker decodes all K messages. up b, down (K-1) b per worker.
        alltoall: worker j decodes and averages shard j, encodes the mean again, all gather it. A second quantization.
        ps: a server decodes, averages and sends fp32 back. up b, down 32 D per worker.
    With ``reduction: ring`` a full-precision vector goes through plain all-reduce: up 32 D, down 2 (K-1)/K 32 D per worker.
    """

    def __init__(self, workers: Workers, codec: Codec, meter: BitMeter, mode: Literal["allgather", "alltoall", "ps"] = "allgather") -> None:
        self.workers, self.codec, self.meter, self.mode = workers, codec, meter, mode
        self.ring = workers.reduction == "ring"
        if self.ring and not getattr(codec, "dense", False) and not codec.shared_support:
            hint = "set exchange.reduction=exact, or codec=fp"
            raise RecipeError(Issue("exchange.reduction", f"ring adds plain numbers, which payloads of {codec.label} are not", "ring", hint))

    def mean(self, vectors: Sequence[Tensor], key: Key, part: str = "gradient", *, want_sent: bool = False) -> Result:
        """The mean over workers of what the codec makes of each vector.

        Args:
            vectors: one of shape (D,) per hosted worker.
            key: stream and step of the draw; the worker is filled in, so each worker rounds independently.
            part: what the bits are counted as.
            want_sent: also return each hosted worker's decoded message.
        """
        length = vectors[0].numel()
        up, down = self.bits(length)
        self.meter.add(part, up, down)
        if self.ring and getattr(self.codec, "dense", False):
            return Result(self.workers.mean(vectors), list(vectors) if want_sent else [])
        if self.mode == "alltoall":
            return self._alltoall(vectors, key, want_sent)
        payloads = [self.codec.encode(v, key.fold(worker=w)) for w, v in zip(self.workers.hosted, vectors, strict=True)]
        if self.mode == "ps":
            return self._server(payloads, length, want_sent)
        everyone = self.workers.gather([p.data for p in payloads], sizes=self._sizes(length))
        mean, mine = self._average(everyone, length, key)
        return Result(mean, mine if want_sent else [])

    def bits(self, length: int) -> tuple[int, int]:
        """Closed form: bits (up, down) over all workers of one exchange of vectors of ``length`` elements."""
        count = self.workers.count
        if self.ring and getattr(self.codec, "dense", False):
            return count * 32 * length, 2 * (count - 1) * 32 * length
        if self.mode == "alltoall":
            shards = [self.codec.payload_bits(stop - start) for start, stop in self.shards(length)]
            return count * sum(shards), 2 * (count - 1) * sum(shards)
        payload = self.codec.payload_bits(length)
        return count * payload, count * 32 * length if self.mode == "ps" else count * (count - 1) * payload

    def shards(self, length: int) -> list[tuple[int, int]]:
        """The part of the vector that each worker averages under alltoall, cut at bucket boundaries."""
        bucket = int(getattr(self.codec.options, "bucket", 1))
        buckets = -(-length // bucket)
        ends = [min(length, bucket * -(-buckets * (w + 1) // self.workers.count)) for w in range(self.workers.count)]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _sizes(self, length: int) -> list[int]:
        return [self.codec.payload_bits(length) // 8] * self.workers.count

    def _average(self, everyone: Sequence[Tensor], length: int, key: Key) -> tuple[Tensor, list[Tensor]]:
        """Decode all messages and add them in worker order."""
        total: Tensor | None = None
        mine = []
        for worker, data in enumerate(everyone):
            decoded = self.codec.decode(Payload(data, length))
            if worker in self.workers.hosted:
                mine.append(decoded)
            total = decoded.clone() if total is None else total.add_(decoded)
        assert total is not None
        return self.codec.combine(total.div_(self.workers.count)), mine

    def _server(self, payloads: Sequence[Payload], length: int, want_sent: bool) -> Result:
        """Worker 0's process is the server: it alone receives all payloads, and sends the mean back in fp32."""
        mine = [self.codec.decode(p) for p in payloads] if want_sent else []
        if self.workers.processes == 1:
            mean, _ = self._average([p.data for p in payloads], length, Key())
            return Result(mean, mine)
        received = self.workers.gather_at_server([p.data for p in payloads])
        if received is not None:
            mean, _ = self._average(received, length, Key())
        else:
            mean = payloads[0].data.new_empty(length, dtype=torch.float32)
        return Result(self.workers.broadcast(mean), mine)

    def _alltoall(self, vectors: Sequence[Tensor], key: Key, want_sent: bool) -> Result:
        """Scatter-reduce with requantization: encode every shard, average the own one, encode it again, gather."""
        workers, codec = self.workers, self.codec
        length, shards = vectors[0].numel(), self.shards(vectors[0].numel())
        sizes = [codec.payload_bits(stop - start) // 8 for start, stop in shards]
        first = [[codec.encode(v[a:b], key.fold(stream=f"shard{j}", worker=w)).data for j, (a, b) in enumerate(shards)] for w, v in zip(workers.hosted, vectors, strict=True)]
        sent = [torch.cat([codec.decode(Payload(d, b - a)) for d, (a, b) in zip(row, shards, strict=True)]) for row in first] if want_sent else []
        received = self._scatter(first, sizes)
        second = []
        for j in workers.hosted:
            a, b = shards[j]
            mean, _ = self._average(received[j], b - a, key)
            second.append(codec.encode(mean, key.fold(stream="again", worker=j)).data)
        everyone = workers.gather(second, sizes=sizes)
        whole = torch.cat([codec.decode(Payload(d, b - a)) for d, (a, b) in zip(everyone, shards, strict=True)])
        assert whole.numel() == length
        return Result(whole, sent)

    def _scatter(self, first: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> dict[int, list[Tensor]]:
        """For each hosted shard, the K workers' messages in worker order."""
        workers = self.workers
        blocks = [range(p * workers.each, (p + 1) * workers.each) for p in range(workers.processes)]
        parts = [torch.cat([row[j] for row in first for j in block]) for block in blocks]  # to process p: by sender, then shard
        mine = sum(sizes[j] for j in workers.hosted)
        received = workers.all_to_all(parts, [mine * workers.each] * workers.processes)
        found: dict[int, list[Tensor]] = {j: [] for j in workers.hosted}
        for data in received:
            at = 0
            for _ in range(workers.each):
                for j in workers.hosted:
                    found[j].append(data[at : at + sizes[j]])
                    at += sizes[j]
        return found
