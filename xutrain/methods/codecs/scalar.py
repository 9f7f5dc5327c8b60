"""The frame that all bucketed scalar quantizers share: buckets, levels, symbols, wire.

A vector is cut into buckets of ``bucket`` elements (the last one shorter, never padded: zeros would move its mean). A codec
says which few numbers of a bucket are sent (``find``), which levels they stand for (``table``) and, unless it rounds randomly,
which level an element takes (``quantise``). Wire: the numbers of all buckets, little endian, then the packed symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.codecs import gpu, packing, rounding
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.methods.codecs.rounding import Draws, look_up, moments, need_key, round_randomly, row_sums
from xutrain.registry import Named

_BF16_MAX = float(torch.finfo(torch.bfloat16).max)


class BucketOptions(Named):
    """Options of every bucketed codec."""

    bucket: int = Field(2048, ge=1, le=1 << 24, description="Elements that share one set of levels.")
    clip: float | None = Field(None, gt=0, description="Clip a bucket to this many standard deviations first; null keeps all values.")
    level_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type in which levels are sent; bf16 halves their cost.")


class Block(NamedTuple):
    """Some whole buckets of a vector: buckets first .. last-1 are its elements start .. stop-1, ``width`` each."""

    first: int
    last: int
    start: int
    stop: int
    width: int


def blocks(length: int, bucket: int, elements: int) -> Iterator[Block]:
    """The buckets of a vector in blocks of equal widths and of about ``elements`` elements."""
    full = length // bucket
    step = max(1, elements // bucket)
    for first in range(0, full, step):
        last = min(first + step, full)
        yield Block(first, last, first * bucket, last * bucket, bucket)
    if length % bucket:
        yield Block(full, full + 1, full * bucket, length, length - full * bucket)


def clipped(rows: Tensor, multiple: float) -> Tensor:
    """``rows`` (B, n) clamped to +-multiple * sigma, sigma the population deviation of the bucket about its mean.

    A constant bucket has sigma 0 and is left as it is: it is sent exactly.
    """
    wide, n = rows.double(), rows.shape[1]
    sigma = (row_sums((wide - row_sums(wide) / n).square()) / n).sqrt()
    constant = rows.amin(1, keepdim=True) == rows.amax(1, keepdim=True)
    limit = torch.where(constant, torch.inf, multiple * sigma).float()
    return torch.minimum(torch.maximum(rows, -limit), limit)


class ScalarCodec(Codec):
    """A quantizer of single values with its own levels for every bucket.

    Class or instance attributes:
        base: number of levels, the alphabet of the symbols.
        sent: numbers sent for a bucket.
        at_a_time: elements worked on at a time on a CPU, so that sorts and prefix sums stay in the cache.
    """

    base: int = 2
    sent: int = 1
    at_a_time: ClassVar[int] = 1 << 17
    keeps_range: ClassVar[bool] = False  # the outer levels reach the extremes, so only clipping and bf16 make a bias

    class Options(BucketOptions):
        pass

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        if options.clip is not None:
            self.contractive = False  # no longer proven: a bucket far from zero with a small deviation is clipped to almost nothing
        if self.keeps_range and (options.clip is not None or options.level_dtype == "bf16"):
            self.biased = True

    # --- what a codec defines

    def find(self, rows: Tensor) -> Tensor:
        """The numbers that are sent for every row of ``rows`` (B, n): float32 (B, sent)."""
        raise NotImplementedError

    def table(self, numbers: Tensor) -> Tensor:
        """Levels, ascending, float32 (B, base), from the numbers that were sent (B, sent)."""
        return numbers

    def quantise(self, rows: Tensor, draws: Draws | None, out: Tensor) -> Tensor:
        """Write symbols to ``out``, uint8 (B, n), and return the numbers to send; random rounding by default."""
        numbers = self.as_sent(self.find(rows))
        assert draws is not None
        round_randomly(rows, self.table(numbers), draws, out)
        return numbers

    # --- what all of them share

    @property
    def label(self) -> str:
        return self.tag(self.options.name.replace("_", "-"))

    def tag(self, label: str) -> str:
        """``label`` with the common options that are set."""
        clip = "" if self.options.clip is None else f"-clip{self.options.clip:g}"
        return label + clip + ("-bf16" if self.options.level_dtype == "bf16" else "")

    def bucket(self, length: int) -> int:
        """Elements in a bucket of a vector of ``length`` elements."""
        return int(self.options.bucket)

    def as_sent(self, numbers: Tensor) -> Tensor:
        """``numbers`` as the receiver will read them, float32."""
        if self.options.level_dtype == "bf16":
            return numbers.clamp(-_BF16_MAX, _BF16_MAX).bfloat16().float()
        return numbers

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        """Encode a vector of shape (n,); see the base class. Raises UsageError for a missing key, NonFinite for NaN and infinity."""
        vector = as_vector(vector)
        length, device = vector.numel(), vector.device
        if self.random:
            key = need_key(key, self.options.name)
        if not length:
            return Payload(torch.empty(0, dtype=torch.uint8, device=device), 0)
        check_finite(vector, self.bucket(length))
        kernels = self._kernels(device)
        if kernels and self.random and key is not None and type(self).quantise is ScalarCodec.quantise and self.options.clip is None:
            return self._encode_on_device(kernels, vector, key)
        symbols = packing.room(self.base, length, device)
        numbers = torch.empty(self._buckets(length), self.sent, dtype=self._dtype, device=device)
        for block in self._blocks(vector):
            rows = self._rows(vector, block)
            draws = Draws(key, block.start) if self.random and key is not None else None
            numbers[block.first : block.last] = self.quantise(rows, draws, symbols[block.start : block.stop].view_as(rows))
        head = numbers.view(-1).view(torch.uint8)
        data = torch.empty(self.payload_bits(length) // 8, dtype=torch.uint8, device=device)
        data[: head.numel()] = head
        packing.pack(symbols, self.base, out=data[head.numel() :])
        return Payload(data, length)

    def decode(self, payload: Payload) -> Tensor:
        """The vector of shape (payload.length,), float32: a table look-up per element."""
        length, device = payload.length, payload.data.device
        out = torch.empty(length, device=device)
        levels, packed = self._head(payload)
        if not length:
            return out
        kernels = self._kernels(device)
        if kernels:
            kernels.unpack(packed, levels.contiguous(), self.bucket(length), out)
            return out
        symbols = packing.unpack(packed, self.base, length)
        for block in self._blocks(out):
            rows = out[block.start : block.stop].view(-1, block.width)
            look_up(levels[block.first : block.last], symbols[block.start : block.stop].view_as(rows), rows)
        return out

    def unseal(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Levels (buckets, base) and symbols (length,) of a payload, as the receiver sees them."""
        levels, packed = self._head(payload)
        return levels, packing.unpack(packed, self.base, payload.length)

    def payload_bits(self, length: int) -> int:
        head = self._buckets(length) * self.sent * self._dtype.itemsize if length else 0
        return 8 * (head + packing.packed_bytes(self.base, length))

    def levels(self, vector: Tensor) -> Tensor:
        """The levels that ``vector`` gets, float32 of shape (buckets, base), ascending within a bucket."""
        vector = as_vector(vector)
        if not vector.numel():
            return torch.empty(0, self.base, device=vector.device)
        check_finite(vector, self.bucket(vector.numel()))
        return torch.cat([self.table(self.as_sent(self.find(self._rows(vector, block)))) for block in self._blocks(vector)])

    def bias_and_variance(self, vector: Tensor) -> tuple[float, float]:
        """Squared bias and variance of the decoded vector, summed over the elements; their sum is the expected squared error."""
        vector = as_vector(vector)
        if not self.random:
            return float((self.decode(self.encode(vector)).double() - vector.double()).square().sum()), 0.0
        levels, bias, variance = self.levels(vector), 0.0, 0.0
        for block in self._blocks(vector):
            b, s = moments(
                vector[block.start : block.stop].view(-1, block.width), self._rows(vector, block), levels[block.first : block.last]
            )
            bias, variance = bias + b, variance + s
        return bias, variance

    def expected_error(self, vector: Tensor) -> float:
        """E||Q(v) - v||^2, in closed form."""
        return sum(self.bias_and_variance(vector))

    def _head(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Levels (buckets, base) and packed symbols."""
        head = self._buckets(payload.length) * self.sent * self._dtype.itemsize
        data = self.received(payload)
        numbers = data[:head].clone().view(self._dtype).view(-1, self.sent).float()
        return self.table(numbers), data[head:]

    def _kernels(self, device: torch.device) -> Any:
        """Triton's kernels where they serve this alphabet on this device."""
        kernels = gpu.kernels(device)
        return kernels if kernels and self.base in kernels.BASES else None

    def _encode_on_device(self, kernels: Any, vector: Tensor, key: Key) -> Payload:
        """Levels by torch, then rounding and packing in one kernel."""
        length = vector.numel()
        numbers = torch.cat([self.as_sent(self.find(self._rows(vector, block))) for block in self._blocks(vector)])
        levels, head = self.table(numbers).contiguous(), numbers.to(self._dtype).contiguous().view(-1).view(torch.uint8)
        data = torch.empty(self.payload_bits(length) // 8, dtype=torch.uint8, device=vector.device)
        data[: head.numel()] = head
        scale = rounding.safe_scale(levels)
        kernels.pack(vector, levels, self.bucket(length), key.words, scale, data[head.numel() :])
        return Payload(data, length)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.options.level_dtype == "bf16" else torch.float32

    def _buckets(self, length: int) -> int:
        return -(-length // max(1, self.bucket(length)))

    def _blocks(self, vector: Tensor) -> Iterator[Block]:
        length = vector.numel()
        return blocks(length, self.bucket(length), self.at_a_time if rounding.on_host(vector.device) else length)

    def _rows(self, vector: Tensor, block: Block) -> Tensor:
        rows = vector[block.start : block.stop].view(-1, block.width)
        return rows if self.options.clip is None else clipped(rows, self.options.clip)
