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
from xutrain.engine.network import Link, Mode, cheaper
from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.errors import Issue, RecipeError
from xutrain.methods.codecs.base import Codec, Payload

Way = tuple[Literal["allgather", "alltoall", "ps"], Literal["exact", "ring"]]


def choose(codec: Codec, length: int, count: int, link: Link, *, again: bool = True) -> Way:
    """(mode, reduction) that average ``count`` vectors of ``length`` elements soonest on ``link``: what ``exchange.mode=auto`` means.

    Messages that can be added as they are go through a plain all-reduce. Of the others bytes and latency are weighed, nothing
    else. Never cut: codecs that work tensor by tensor, and vectors that must not be quantized ``again`` (error feedback).
    """
    if codec.dense or codec.shared_support or codec.collective:
        return "allgather", "ring"
    return (cheaper(link, codec.payload_bits(length), count) if again and not codec.per_tensor else "allgather"), "exact"


def shards(codec: Codec, length: int, count: int) -> list[tuple[int, int]]:
    """A vector of ``length`` elements in ``count`` parts of about equal size, cut at the codec's bucket boundaries."""
    bucket = int(getattr(codec.options, "bucket", 1))
    buckets = -(-length // bucket)
    ends = [min(length, bucket * -(-buckets * (w + 1) // count)) for w in range(count)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass
class Result:
    """What an exchange returns: the mean, and what each hosted worker's own message decodes to (error feedback needs it)."""

    mean: Tensor
    sent: list[Tensor]


@dataclass
class Fed:
    """What an exchange with feedback returns: the mean of the messages and, if asked for, the mean of their squared norms."""

    mean: Tensor
    power: float | None = None


class Exchange:
    """Averages one float32 vector per hosted worker.

    Modes (b = bits of a payload of the whole vector, K workers, D elements):
        allgather: every worker decodes all K messages. up b, down (K-1) b per worker.
        alltoall: worker j decodes and averages shard j, encodes the mean again, all gather it. A second quantization.
        ps: a server decodes, averages and sends fp32 back. up b, down 32 D per worker.
    With ``reduction: ring`` a full-precision vector goes through plain all-reduce: up 32 D, down 2 (K-1)/K 32 D per worker.
    Codecs with a shared support exchange their slice of b bits in the same way, and ``ps`` sends b bits back. ``choose`` picks.
    """

    def __init__(self, workers: Workers, codec: Codec, meter: BitMeter, mode: Literal["allgather", "alltoall", "ps"] = "allgather") -> None:
        self.workers, self.codec, self.meter, self.mode = workers, codec, meter, mode
        self.ring = workers.reduction == "ring"
        self.sums = codec.dense or codec.shared_support or codec.collective  # messages that can be added as they are
        if self.ring and not self.sums:
            hint = "set exchange.reduction=exact, or codec=fp"
            raise RecipeError(
                Issue("exchange.reduction", f"ring adds plain numbers, which payloads of {codec.label} are not", "ring", hint)
            )
        if mode == "alltoall" and codec.per_tensor:
            raise RecipeError(
                Issue(
                    "exchange.mode",
                    f"alltoall cuts the vector into shards, and {codec.label} works tensor by tensor",
                    mode,
                    "set exchange.mode=allgather",
                )
            )
        if mode == "ps" and codec.collective:
            raise RecipeError(
                Issue("exchange.mode", f"{codec.label} is two all-reduces without a server", mode, "set exchange.mode=allgather")
            )

    def mean(self, vectors: Sequence[Tensor], key: Key, part: str = "gradient", *, want_sent: bool = False) -> Result:
        """The mean over workers of what the codec makes of each vector.

        Args:
            vectors: one of shape (D,) per hosted worker.
            key: stream and step of the draw; the worker is filled in, so each worker rounds independently.
            part: what the bits are counted as.
            want_sent: also return each hosted worker's decoded message.
        """
        length = vectors[0].numel()
        if self.codec.shared_support or self.codec.collective:
            left = [v.clone() for v in vectors]
            mean = self.feedback(left, key, part).mean
            return Result(mean, [v - r for v, r in zip(vectors, left, strict=True)] if want_sent else [])
        up, down = self.bits(length)
        self.meter.add(part, up, down)
        if self.codec.dense and (self.ring or self.mode == "allgather"):
            return Result(self.workers.mean(vectors), list(vectors) if want_sent else [])
        if self.mode == "alltoall":
            return self._alltoall(vectors, key, want_sent)
        payloads = [self.codec.encode(v, key.fold(worker=w)) for w, v in zip(self.workers.hosted, vectors, strict=True)]
        if self.mode == "ps":
            return self._server(payloads, length, want_sent)
        everyone = self.workers.gather([p.data for p in payloads], sizes=self._sizes(length))
        mean, mine = self._average(everyone, length, key)
        return Result(mean, mine if want_sent else [])

    def _gathered(self, payloads: Sequence[Payload], length: int, key: Key, dtype: torch.dtype) -> Tensor:
        if self.mode == "ps":
            return self._server(payloads, length, False, dtype).mean
        return self._average(self.workers.gather([p.data for p in payloads], sizes=self._sizes(length)), length, key, dtype)[0]

    def feedback(self, vectors: Sequence[Tensor], key: Key, part: str = "gradient", *, power: bool = False) -> Fed:
        """The mean of C(v^k); every vector becomes its residual v^k - C(v^k), in place.

        Args:
            vectors: one of shape (D,) per hosted worker, float32 (float64 in tests).
            power: also return (1/K) sum_k ||C(v^k)||^2, as one more number beside a shared slice. Needs messages that can be added.
        """
        codec, length = self.codec, vectors[0].numel()
        self.meter.add(part, *self.bits(length, power))
        if codec.collective:
            return Fed(codec.reduce(vectors, self.workers.mean, key))
        if codec.shared_support or (codec.dense and (power or self.mode != "ps")):
            return self._slice(vectors, key, power)
        payloads = [codec.encode(v, key.fold(worker=w)) for w, v in zip(self.workers.hosted, vectors, strict=True)]
        mean = self._gathered(payloads, length, key, vectors[0].dtype)
        for vector, payload in zip(vectors, payloads, strict=True):
            vector.sub_(codec.decode(payload))
        return Fed(mean)

    def two_way(self, vectors: Sequence[Tensor], server: Tensor | None, key: Key, part: str = "gradient") -> Tensor:
        """Both directions compressed: the server averages C(v^k), adds its residual, compresses again and sends that.

        Every vector becomes its residual; ``server`` (on worker 0's process; None: the server forgets what it leaves out) is
        updated in place. Returns what all workers receive. Up b, down b per worker.
        """
        codec, workers, length = self.codec, self.workers, vectors[0].numel()
        bits = workers.count * codec.payload_bits(length)
        self.meter.add(part, bits, bits)
        payloads = [codec.encode(v, key.fold(worker=w)) for w, v in zip(workers.hosted, vectors, strict=True)]
        received = workers.gather_at_server([p.data for p in payloads])
        for vector, payload in zip(vectors, payloads, strict=True):
            vector.sub_(codec.decode(payload))
        if received is None:
            data = payloads[0].data.new_empty(codec.payload_bits(length) // 8)
        else:
            total, _ = self._average(received, length, key, vectors[0].dtype)
            if server is not None:
                server.add_(total)
                total = server
            answer = codec.encode(total, key.fold(stream="server", worker=0))
            data = answer.data
            if server is not None:
                server.sub_(codec.decode(answer))
        return codec.decode(Payload(workers.broadcast(data), length)).to(vectors[0].dtype)

    def average(self, vectors: Sequence[Tensor], part: str) -> Tensor:
        """The plain mean, in full precision."""
        self.meter.add(part, *self.dense_bits(vectors[0].numel()))
        return self.workers.mean(vectors)

    def dense_bits(self, length: int) -> tuple[int, int]:
        """Closed form: bits (up, down) over all workers of one full-precision mean."""
        return self._sum_bits(32 * length)

    def _sum_bits(self, each: int) -> tuple[int, int]:
        """All-reduce (ring) or all-gather (exact: added in worker order) of ``each`` bits per worker."""
        count = self.workers.count
        return count * each, (2 * (count - 1) if self.ring else count * (count - 1)) * each

    def _slice(self, vectors: Sequence[Tensor], key: Key, power: bool) -> Fed:
        """Take the coordinates that all workers send, add them as they are."""
        codec, length = self.codec, vectors[0].numel()
        shared = key.fold(worker=0)
        values = [v.clone() if codec.dense else codec.take(v, shared) for v in vectors]  # type: ignore[attr-defined]
        for vector, sent in zip(vectors, values, strict=True):
            if codec.dense:
                vector.zero_()
            else:
                at = codec.positions(length, shared, vector.device)  # type: ignore[attr-defined]
                vector[at] -= sent
        if power:
            values = [torch.cat([v, torch.linalg.vector_norm(v).square().view(1)]) for v in values]
        if self.mode == "ps":
            received = self.workers.gather_at_server(values)
            mean = torch.stack(received).sum(0).div_(self.workers.count) if received is not None else torch.empty_like(values[0])
            mean = self.workers.broadcast(mean)
        else:
            mean = self.workers.mean(values)
        spread = float(mean[-1]) if power else None
        mean = mean[:-1] if power else mean
        return Fed(mean if codec.dense else codec.put(mean, length, shared), spread)  # type: ignore[attr-defined]

    def bits(self, length: int, power: bool = False) -> tuple[int, int]:
        """Closed form: bits (up, down) over all workers of one exchange of vectors of ``length`` elements."""
        count = self.workers.count
        if self.codec.shared_support or self.codec.collective or (self.codec.dense and (self.ring or power)):
            each = self.codec.payload_bits(length) + 32 * power
            return (count * each, count * each) if self.mode == "ps" else self._sum_bits(each)
        if self.mode == "alltoall":
            shards = [self.codec.payload_bits(stop - start) for start, stop in self.shards(length)]
            return count * sum(shards), 2 * (count - 1) * sum(shards)
        payload = self.codec.payload_bits(length)
        return count * payload, count * 32 * length if self.mode == "ps" else count * (count - 1) * payload

    def seconds(self, length: int, link: Link) -> float:
        """What one exchange costs on ``link`` with a worker to a process, without encoding and decoding."""
        payload, mode = float(self.codec.payload_bits(length)), self.mode
        if mode == "ps":
            return link.exchange("ps", payload, self.workers.count, payload if self.sums else 32.0 * length)
        way: Mode = mode if not self.sums else "allreduce" if self.ring else "allgather"
        return link.exchange(way, payload, self.workers.count)

    def processor(self, encode: float, decode: float) -> float:
        """Seconds that one worker computes in an exchange, where its whole vector takes ``encode`` and ``decode`` seconds.

        Under ``ps`` the server's share, since the others wait for it.
        """
        count = self.workers.count
        if self.sums or count == 1:
            return encode + decode
        if self.mode == "alltoall":
            return encode + decode + encode / count + decode
        return encode + count * decode

    def shards(self, length: int) -> list[tuple[int, int]]:
        """The part of the vector that each worker averages under alltoall, cut at bucket boundaries."""
        return shards(self.codec, length, self.workers.count)

    def _sizes(self, length: int) -> list[int]:
        return [self.codec.payload_bits(length) // 8] * self.workers.count

    def _average(
        self, everyone: Sequence[Tensor], length: int, key: Key, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode all messages and add them in worker order."""
        total: Tensor | None = None
        mine = []
        for worker, data in enumerate(everyone):
            decoded = self.codec.decode(Payload(data, length)).to(dtype)
            if worker in self.workers.hosted:
                mine.append(decoded)
            total = decoded.clone() if total is None else total.add_(decoded)
        assert total is not None
        return self.codec.combine(total.div_(self.workers.count)), mine

    def _server(self, payloads: Sequence[Payload], length: int, want_sent: bool, dtype: torch.dtype = torch.float32) -> Result:
        """Worker 0's process is the server: it alone receives all payloads, and sends the mean back in fp32."""
        mine = [self.codec.decode(p) for p in payloads] if want_sent else []
        if self.workers.processes == 1:
            mean, _ = self._average([p.data for p in payloads], length, Key(), dtype)
            return Result(mean, mine)
        received = self.workers.gather_at_server([p.data for p in payloads])
        if received is not None:
            mean, _ = self._average(received, length, Key(), dtype)
        else:
            mean = payloads[0].data.new_empty(length, dtype=dtype)
        return Result(self.workers.broadcast(mean), mine)

    def _alltoall(self, vectors: Sequence[Tensor], key: Key, want_sent: bool) -> Result:
        """Scatter-reduce with requantization: encode every shard, average the own one, encode it again, gather."""
        workers, codec = self.workers, self.codec
        length, shards = vectors[0].numel(), self.shards(vectors[0].numel())
        sizes = [codec.payload_bits(stop - start) // 8 for start, stop in shards]
        first = [
            [codec.encode(v[a:b], key.fold(stream=f"shard{j}", worker=w)).data for j, (a, b) in enumerate(shards)]
            for w, v in zip(workers.hosted, vectors, strict=True)
        ]
        sent = (
            [torch.cat([codec.decode(Payload(d, b - a)) for d, (a, b) in zip(row, shards, strict=True)]) for row in first]
            if want_sent
            else []
        )
        received = self.scatter(first, sizes)
        second = []
        for j in workers.hosted:
            a, b = shards[j]
            mean, _ = self._average(received[j], b - a, key)
            second.append(codec.encode(mean, key.fold(stream="again", worker=j)).data)
        everyone = workers.gather(second, sizes=sizes)
        whole = torch.cat([codec.decode(Payload(d, b - a)) for d, (a, b) in zip(everyone, shards, strict=True)])
        assert whole.numel() == length
        return Result(whole, sent)

    def scatter(self, first: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> dict[int, list[Tensor]]:
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
