"""Randomness keyed by (seed, stream, step, worker): never by rank, never by the order of calls.

``Key.uniform`` is a counter-based generator: element i depends on the key and on i alone, so any part of the sequence
can be drawn anywhere (another process, a compiled kernel, a GPU) with the same bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where it is used: a party's process of `xutrain vertical` starts without torch
    import torch

_GOLDEN, _M1, _M2 = 0x9E3779B1, 0x21F0AAAD, 0x735A2D97
_CHUNK = 1 << 16  # elements that stay in the cache while they are hashed
_COUNTER = (np.arange(_CHUNK, dtype=np.uint64) * _GOLDEN).astype(np.uint32)  # wraps as uint32 multiplication does


@dataclass(frozen=True)
class Key:
    """A place in the run at which randomness is drawn."""

    seed: int = 0
    stream: str = ""
    step: int = 0
    worker: int = 0

    def fold(self, *, stream: str | None = None, step: int | None = None, worker: int | None = None) -> Key:
        """The same key with some parts replaced; a given ``stream`` is appended to the present one."""
        joined = self.stream if stream is None else f"{self.stream}/{stream}" if self.stream else stream
        return replace(self, stream=joined, step=self.step if step is None else step, worker=self.worker if worker is None else worker)

    @cached_property
    def words(self) -> tuple[int, int]:
        """Two 32-bit words that stand for this key."""
        text = f"{self.seed}|{self.stream}|{self.step}|{self.worker}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    @property
    def integer(self) -> int:
        """A 63-bit seed for a generator of another library."""
        low, high = self.words
        return (low | high << 32) & (2**63 - 1)

    def bits(self, n: int, start: int = 0) -> np.ndarray:
        """``n`` hashed 32-bit words, uint32 of shape (n,), for the counters start .. start+n-1."""
        out = np.empty(n, dtype=np.uint32)
        scratch = np.empty(min(n, _CHUNK), dtype=np.uint32)
        low, high = self.words
        for at in range(0, n, _CHUNK):
            h = out[at : at + _CHUNK]
            s = scratch[: len(h)]
            offset = ((start + at) * _GOLDEN + low) & 0xFFFFFFFF
            np.add(_COUNTER[: len(h)], np.uint32(offset), out=h)
            np.right_shift(h, 16, out=s)
            np.bitwise_xor(h, s, out=h)
            np.multiply(h, np.uint32(_M1), out=h)
            np.bitwise_xor(h, np.uint32(high), out=h)
            np.right_shift(h, 15, out=s)
            np.bitwise_xor(h, s, out=h)
            np.multiply(h, np.uint32(_M2), out=h)
            np.right_shift(h, 15, out=s)
            np.bitwise_xor(h, s, out=h)
        return out

    def uniform(self, n: int, device: torch.device | str = "cpu", start: int = 0) -> torch.Tensor:
        """``n`` float32 values in [0, 1) with 24 random bits each, shape (n,), for the counters start .. start+n-1."""
        import torch

        if torch.device(device).type != "cpu":
            return _uniform_on(self.words, n, torch.device(device), start)
        words = self.bits(n, start)
        np.right_shift(words, 8, out=words)
        values = words.astype(np.float32)
        values *= np.float32(2.0**-24)
        return torch.from_numpy(values)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator seeded from this key, for permutations, normal numbers and dropout."""
        import torch

        return torch.Generator(device=device).manual_seed(self.integer)

    def numpy(self) -> np.random.Generator:
        """A numpy generator seeded from this key."""
        return np.random.Generator(np.random.Philox(self.integer))


def _uniform_on(words: tuple[int, int], n: int, device: torch.device, start: int = 0) -> torch.Tensor:
    """The same sequence computed on a device, in 64-bit arithmetic masked to 32 bits (torch has no uint32 product)."""
    import torch

    low, high = words
    mask = 0xFFFFFFFF
    h = (torch.arange(start, start + n, device=device, dtype=torch.int64) * _GOLDEN + low) & mask
    h = ((h ^ (h >> 16)) * _M1) & mask
    h = h ^ high
    h = ((h ^ (h >> 15)) * _M2) & mask
    h = h ^ (h >> 15)
    return (h >> 8).to(torch.float32) * 2.0**-24


def key(seed: int = 0, stream: str = "", step: int = 0, worker: int = 0) -> Key:
    """The key of one draw: same arguments, same numbers, on any process and device."""
    return Key(seed, stream, step, worker)
