"""Codecs that send the same coordinates from every worker: the sum of the messages is the message of the sum.

So plain all-reduce works, on the slice alone; no indices cross the wire, because all workers draw them from one key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.methods.codecs.rounding import need_key


class SharedSupport(Codec):
    """C(v) = v at ``positions(n, key)`` (times ``gain``) and 0 elsewhere; 32 bits per position.

    The key of a draw is the step's, never a worker's: its step is the number of the exchange.
    """

    biased = True
    contractive = True
    random = True
    shared_support = True
    per_tensor = True
    _known: tuple[int, Key, str] | None = None
    _known_of: Sequence[Slice] = ()

    def draw(self, length: int, key: Key) -> Tensor:
        """The coordinates that are sent, distinct, int64 of shape (payload_bits(length) / 32,)."""
        raise NotImplementedError

    def gain(self, length: int, device: torch.device) -> Tensor | None:
        """Factor of every sent value, shape of ``draw``; None for 1."""
        return None

    def positions(self, length: int, key: Key | None, device: torch.device | str = "cpu") -> Tensor:
        """``draw`` on a device; the last draw is remembered, since every worker of a process asks for the same."""
        shared = need_key(key, str(self.options.name)).fold(worker=0)
        wanted = (length, shared, str(device))
        if self._known != wanted or self._known_of is not self.layout:
            self._drawn = self.draw(length, shared).to(device)
            self._known, self._known_of = wanted, self.layout
        return self._drawn

    def take(self, vector: Tensor, key: Key | None) -> Tensor:
        """What is sent of ``vector``, in its own type. Raises NonFinite where that holds NaN or infinity."""
        at = self.positions(vector.numel(), key, vector.device)
        values = vector[at]
        if not bool(torch.isfinite(values.sum())):
            check_finite(vector, max(1, vector.numel()))
        gain = self.gain(vector.numel(), vector.device)
        bound = torch.finfo(values.dtype).max
        return values if gain is None else values.mul_(gain).clamp_(-bound, bound)

    def put(self, values: Tensor, length: int, key: Key | None) -> Tensor:
        """The vector of ``length`` elements that ``values`` stand for."""
        out = values.new_zeros(length)
        out[self.positions(length, key, values.device)] = values
        return out

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        key, vector = need_key(key, str(self.options.name)).fold(worker=0), as_vector(vector)
        check_finite(vector, max(1, vector.numel()))  # all of it: what is not sent now is somebody's residual
        if not vector.numel():
            return Payload(vector.new_empty(0, dtype=torch.uint8), 0, key)
        return Payload(self.take(vector, key).view(torch.uint8), vector.numel(), key)

    def decode(self, payload: Payload) -> Tensor:
        data = self.received(payload)
        return self.put(data.view(torch.float32), payload.length, payload.key) if payload.length else data.float()


def check_ratio(codec: Codec, ratio: float, flat: bool) -> None:
    """Refuse a ratio by which not even the largest tensor could send one element of its own.

    Raises:
        RecipeError: names the largest allowed ratio.
    """
    sizes = [part.numel for part in codec.layout]
    largest = sum(sizes) if flat else max(sizes, default=0)
    if ratio > largest:
        what = "the parameters" if flat else "the largest tensor's elements"
        raise RecipeError(
            Issue("codec.ratio", f"above the number of {what}, allowed are 1 to {largest}", ratio, f"set codec.ratio={min(64, largest)}")
        )


def flat_or_tensors(codec: Codec, length: int) -> list[tuple[str, int, int]]:
    """(name, start, numel) of the parts in which a codec with a ``scope`` option works."""
    options: Any = codec.options
    if options.scope == "flat":
        return [("", 0, length)] if length else []
    return [(part.name, part.start, part.numel) for part in codec.tensors(length)]
