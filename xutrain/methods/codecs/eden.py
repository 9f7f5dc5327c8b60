"""Random rotation and fixed levels (the DRIVE and EDEN family). Beyond the paper; the peer to beat.

    r = H (f * v) / sqrt(N);   q_i = the level nearest to r_i sqrt(N) / ||v||;   decoded: f * H (S q) / sqrt(N)
    S = ||v||^2 / <r, q>   (scale: unbiased)     or     S = <r, q> / ||q||^2   (scale: least_squares)

v is a bucket padded to N elements, a power of two; H is the Walsh-Hadamard matrix, f are signs drawn from the 8 bytes that the
message begins with, and the levels are the Lloyd-Max levels of the unit Gaussian.

Limits: a bucket with one element other than 0 comes back exactly, up to rounding. 2 levels and least_squares: the scaled sign of r.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.codecs import packing
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.methods.codecs.rounding import greater, look_up, need_key, on_host, row_sums
from xutrain.methods.codecs.walsh import hadamard
from xutrain.registry import Named, codec

#: Lloyd-Max levels of the unit Gaussian and the thresholds between them: the positive half.
_LEVELS = {2: (0.7979,), 3: (1.2240,), 5: (0.7646, 1.7241), 9: (0.4436, 0.9188, 1.4764, 2.2547)}
_THRESHOLDS = {2: (), 3: (0.6120,), 5: (0.3823, 1.2444), 9: (0.2218, 0.6812, 1.1976, 1.8655)}
_KEY_BYTES = 8
_BLOCK = 1 << 16
_MAX = float(torch.finfo(torch.float32).max)
_LARGE = 1e28  # above this the transform of 2^24 values may overflow


@codec("eden", summary="beyond the paper: random rotation, Gaussian Lloyd-Max levels, one scale per bucket")
class Eden(Codec):
    """r = H(flips * v) / sqrt(N); q = nearest level of r sqrt(N) / ||v||; decodes to flips * H(S q) / sqrt(N).

    S = ||v||^2 / <r, q> makes it unbiased over the rotation (to sampling error: one randomised Hadamard transform is not a
    uniform rotation); ``scale: least_squares`` takes S = <r, q> / ||q||^2 instead, which is biased, of least error, and
    contractive. A bucket is padded to a power of two, N; the padding is sent. Scales beyond float32 saturate.

    Wire: 8 bytes that both sides derive the flips from, one float32 per bucket, the packed symbols of all padded buckets. The
    8 bytes are counted: nothing travels beside the payload.
    """

    random = True

    class Options(Named):
        name: str = "eden"
        levels: int = Field(3, description="Number of levels: 2, 3, 5 or 9.")
        bucket: int = Field(2048, ge=1, le=1 << 24, description="Elements that share one rotation and one scale.")
        scale: Literal["unbiased", "least_squares"] = Field("unbiased", description="Scale of a bucket: unbiased, or of least error.")

        @field_validator("levels")
        @classmethod
        def _tabulated(cls, value: int) -> int:
            if value not in _LEVELS:
                raise ValueError("must be 2, 3, 5 or 9")
            return value

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.base = options.levels
        self.biased = self.contractive = options.scale == "least_squares"
        half = torch.tensor(_LEVELS[self.base])
        self.grid = torch.cat((-half.flip(0), torch.zeros(self.base % 2), half))
        edge = torch.tensor(_THRESHOLDS[self.base])
        self.edges = torch.cat((-edge.flip(0), torch.zeros(1 - self.base % 2), edge))

    @property
    def label(self) -> str:
        return f"eden-{self.base}" + ("" if self.options.scale == "unbiased" else "-ls")

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        """Encode a vector of shape (n,). Raises UsageError for a missing key, NonFinite for NaN and infinity."""
        vector, length, device = as_vector(vector), vector.numel(), vector.device
        seed = need_key(key, "eden").integer
        if not length:
            return Payload(torch.empty(0, dtype=torch.uint8, device=device), 0)
        check_finite(vector, self.options.bucket)
        buckets, padded = self._shape(length)
        symbols = packing.room(self.base, padded, device)
        scales = torch.empty(buckets, 1, device=device)
        for first, last, start, stop, width, at in self._blocks(length, device):
            rows = vector[start:stop].view(last - first, width)
            size = _power(width)
            if size != width:
                rows = torch.nn.functional.pad(rows, (0, size - width))
            end = at + rows.numel()
            scales[first:last] = self._bucket(rows, _flips(seed, at, rows.shape, device), symbols[at:end].view_as(rows))
        data = torch.empty(self.payload_bits(length) // 8, dtype=torch.uint8, device=device)
        head = _KEY_BYTES + 4 * buckets
        data[:_KEY_BYTES] = torch.frombuffer(bytearray(seed.to_bytes(_KEY_BYTES, "little")), dtype=torch.uint8)
        data[_KEY_BYTES:head] = scales.view(-1).view(torch.uint8)
        packing.pack(symbols, self.base, out=data[head:])
        return Payload(data, length)

    def _bucket(self, rows: Tensor, flips: Tensor, out: Tensor) -> Tensor:
        """Symbols of rows (B, N) to ``out``; the scales (B, 1)."""
        size = rows.shape[1]
        # divided by the largest magnitude first, so that neither squares nor sums overflow
        peak = rows.abs().amax(1, keepdim=True)
        unit = rows / torch.where(peak > 0, peak, 1.0)
        norm = row_sums(unit.double().square())  # ||v||^2
        r = hadamard(unit * flips)  # sqrt(N) times the rotated bucket, so that its rms is ||v||
        rms = norm.sqrt().float()
        hit = torch.empty_like(out)
        for i, edge in enumerate(self.edges.tolist()):
            greater(r, edge * rms, hit if i else out)
            if i:
                out.add_(hit)
        q = torch.empty_like(rows)
        look_up(self.grid.to(rows.device).expand(len(rows), -1).contiguous(), out, q)
        inner = row_sums(r.double() * q) / size**0.5  # <r, q>
        if self.options.scale == "unbiased":
            scale = norm / inner
        else:
            scale = inner / row_sums(q.double().square())
        return torch.where(norm > 0, scale * peak, 0.0).clamp(max=_MAX).float()

    def decode(self, payload: Payload) -> Tensor:
        length, data, device = payload.length, self.received(payload), payload.data.device
        out = torch.empty(length, device=device)
        if not length:
            return out
        buckets, padded = self._shape(length)
        head = _KEY_BYTES + 4 * buckets
        seed = int.from_bytes(data[:_KEY_BYTES].cpu().numpy().tobytes(), "little")
        scales = data[_KEY_BYTES:head].view(torch.float32).view(-1, 1)
        small = 2.0**-32 if float(scales.amax()) > _LARGE else 1.0  # keeps the sums of the transform finite
        symbols = packing.unpack(data[head:], self.base, padded)
        for first, last, start, stop, width, at in self._blocks(length, device):
            size = _power(width)
            q = torch.empty(last - first, size, device=device)
            grid = self.grid.to(device) * (scales[first:last] * small / size**0.5)
            look_up(grid.contiguous(), symbols[at : at + q.numel()].view_as(q), q)
            rows = hadamard(q) * _flips(seed, at, q.shape, device)
            if small != 1.0:
                rows = (rows / small).clamp(-_MAX, _MAX)
            out[start:stop] = rows[:, :width].reshape(-1)
        return out

    def payload_bits(self, length: int) -> int:
        if not length:
            return 0
        buckets, padded = self._shape(length)
        return 8 * (_KEY_BYTES + 4 * buckets + packing.packed_bytes(self.base, padded))

    def expected_error(self, vector: Tensor, draws: int = 32) -> float:
        """E||Q(v) - v||^2 over the rotation, the mean of ``draws`` of them (it has no closed form)."""
        errors = [(self.decode(self.encode(vector, Key(i, "expected"))) - vector).double().square().sum() for i in range(draws)]
        return float(torch.stack(errors).mean())

    def _shape(self, length: int) -> tuple[int, int]:
        """Number of buckets and of symbols."""
        full, rest = divmod(length, self.options.bucket)
        return full + (rest > 0), full * _power(self.options.bucket) + (_power(rest) if rest else 0)

    def _blocks(self, length: int, device: torch.device) -> list[tuple[int, int, int, int, int, int]]:
        """Blocks of buckets: first, last, start, stop, width as in ``scalar.blocks``, and where their symbols begin."""
        bucket, size = self.options.bucket, _power(self.options.bucket)
        full, rest = divmod(length, bucket)
        step = max(1, full if not on_host(device) else _BLOCK // size)
        found = []
        for first in range(0, full, step):
            last = min(first + step, full)
            found.append((first, last, first * bucket, last * bucket, bucket, first * size))
        if rest:
            found.append((full, full + 1, full * bucket, length, rest, full * size))
        return found


def _power(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _flips(seed: int, start: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Signs +1 and -1, float32: the top bits of the keyed sequence from ``start`` on, the same on every device."""
    key, n = Key(seed, "rotation"), shape.numel()
    if not on_host(device):
        return torch.where(key.uniform(n, device, start) < 0.5, 1.0, -1.0).view(shape)
    words = key.bits(n, start)
    np.bitwise_and(words, np.uint32(0x80000000), out=words)
    np.bitwise_or(words, np.uint32(0x3F800000), out=words)  # the bits of +-1.0
    return torch.from_numpy(words.view(np.float32)).view(shape)
