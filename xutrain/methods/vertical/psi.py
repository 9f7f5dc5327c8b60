"""Private set intersection of ids: Diffie-Hellman on curve25519, every id raised to the secret of every party.

Ids are hashed to points of the curve itself (try and increment until u^3 + 486662 u^2 + u is a square), or else the side of the
twist on which an id's hash lies would leak one bit of it. Exponents are X25519 keys of the ``cryptography`` package; exponentiation
commutes. A party's list goes round all other parties and comes back, in its own order; then the finished values are shared, sorted.

What each party learns: the sizes of all lists, and which of its own ids each other party has. Nothing about ids it does not hold.
The common rows are put in the order of their finished values, which is the same everywhere and says nothing about the ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

_P = 2**255 - 19
_A = 486662
WIDTH = 32


def to_point(identifier: str, salt: str) -> bytes:
    """u-coordinate of a curve point, 32 bytes little-endian, of an id under a salt that all parties share."""
    for attempt in range(256):
        digest = hashlib.sha512(f"{salt}\0{attempt}\0{identifier}".encode()).digest()
        u = int.from_bytes(digest, "little") % _P
        v = (u * u * u + _A * u * u + u) % _P
        if u > 1 and pow(v, (_P - 1) // 2, _P) == 1:
            return u.to_bytes(WIDTH, "little")
    raise AssertionError("no point found in 256 attempts")


class Blinder:
    """One party's secret exponent, for one alignment."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()

    def blind(self, points: Iterable[bytes]) -> list[bytes]:
        """Every point raised to the secret, in the same order. Raises ValueError for a point that is none."""
        return [self._key.exchange(X25519PublicKey.from_public_bytes(p)) for p in points]


def split(data: bytes) -> list[bytes]:
    """Points from their concatenation. Raises ValueError for a torn one."""
    if len(data) % WIDTH:
        raise ValueError("a torn list of points")
    return [data[at : at + WIDTH] for at in range(0, len(data), WIDTH)]
