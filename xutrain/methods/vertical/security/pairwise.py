"""Pairwise masks: each two responders share a key; what one adds to its product, the other subtracts.

For request (r, k) responder l sends  encode(z_l) + sum_{j>l} PRG(s_lj, r, k) - sum_{j<l} PRG(s_jl, r, k)  in the ring of 64-bit integers,
over the responders named in the request. The requester adds the messages: the masks cancel exactly. Nothing but the sum of the
honest responders leaks, provided that two of them are honest. A pair (r, k) is used once: a retry takes a new k, for the weights
may have moved.

The stream is ChaCha20 of the ``cryptography`` package, keys by X25519 and HKDF-SHA256. In a simulation, where all parties are one
process and nothing is to hide, Philox stands in when the package is missing; the totals are the same to the bit, since masks cancel.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import numpy as np

from xutrain.methods.vertical.security.fixed import Ring

#: (requester, request number, count) -> count ring elements.
Stream = Callable[[int, int, int], Ring]


def has_cryptography() -> bool:
    """Whether the package that real parties need is installed."""
    import importlib.util

    return importlib.util.find_spec("cryptography") is not None


def chacha(key: bytes) -> Stream:
    """The stream of one pair key (32 bytes)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    assert len(key) == 32

    def draw(requester: int, request: int, count: int) -> Ring:
        nonce = struct.pack("<IIQ", 0, requester, request)  # block counter 0, then the 96-bit nonce
        stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(8 * count))
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64)

    return draw


def philox(key: bytes) -> Stream:
    """A stand-in for simulations only: statistically fine, not a cipher."""

    def draw(requester: int, request: int, count: int) -> Ring:
        counter = np.array([0, 0, requester, request], dtype=np.uint64)
        bits = np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64), counter=counter)
        return bits.random_raw(count).astype(np.uint64)

    return draw


def simulated_key(seed: int, a: int, b: int) -> bytes:
    """The pair key of a simulation, from the run's seed."""
    return hashlib.blake2b(f"pair|{seed}|{min(a, b)}|{max(a, b)}".encode(), digest_size=32).digest()


def agreed_key(private: bytes, public: bytes, run: str) -> bytes:
    """The pair key of two real parties for one run: X25519, then HKDF-SHA256 bound to the run."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"xutrain vertical pair|" + run.encode()).derive(shared)


class Pairwise:
    """The masks of one party.

    Args:
        party: this party's number. streams: the stream shared with each other party.
    """

    def __init__(self, party: int, streams: dict[int, Stream]) -> None:
        self.party, self.streams = party, streams

    def mask(self, requester: int, request: int, responders: list[int], count: int) -> Ring:
        """Sum of this party's masks for one request, ``count`` ring elements; zero when it is the only responder."""
        total = np.zeros(count, dtype=np.uint64)
        for other in responders:
            if other > self.party:
                total += self.streams[other](requester, request, count)
            elif other < self.party:
                total -= self.streams[other](requester, request, count)
        return total
