"""What messages cost on a network: an alpha-beta model, a latency and a bandwidth. Torch-free.

A message of s bits takes alpha + s / B seconds, alpha the latency and B the bits per second that a worker can send and, at the
same time, receive. Every worker has a link of its own into a network that is never the bottleneck. The collectives are counted
as the algorithms that gloo and NCCL use for large messages:

    all-reduce  ring             2 (n-1) alpha + 2 (n-1)/n s / B
    all-gather  ring               (n-1) alpha +   (n-1)   s / B     s bits of every worker
    all-to-all  pairs              (n-1) alpha +   (n-1)/n s / B     s bits of every worker, cut into n parts
    gather at a server               n-1 messages through one link, alpha + (n-1) s / B
    broadcast   binomial tree      ceil(log2 n) (alpha + s / B)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from xutrain.errors import Issue, UsageError

Mode = Literal["allreduce", "allgather", "alltoall", "ps"]

_RATE = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?)(bit|bits|b|bps|bit/s|byte|bytes|byte/s|b/s)?\s*$", re.I)
_TIME = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(ns|us|µs|ms|s)\s*$", re.I)
_POWERS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Link:
    """A worker's way into the network.

    Attributes:
        bandwidth: bits per second in each direction; infinity for none that matters.
        latency: seconds of a message, however short.
    """

    bandwidth: float = 1e9
    latency: float = 50e-6

    def seconds(self, bits: float, messages: float = 1) -> float:
        """Time of ``messages`` one after another that hold ``bits`` together."""
        return messages * self.latency + bits / self.bandwidth

    def allreduce(self, bits: float, n: int) -> float:
        """A ring over n workers, each of which holds ``bits``."""
        return self.seconds(2 * (n - 1) / n * bits, 2 * (n - 1))

    def allgather(self, bits: float, n: int) -> float:
        """Everyone receives the ``bits`` of everyone else."""
        return self.seconds((n - 1) * bits, n - 1)

    def alltoall(self, bits: float, n: int) -> float:
        """Everyone sends a part of its ``bits`` to everyone else."""
        return self.seconds((n - 1) / n * bits, n - 1)

    def gather(self, bits: float, n: int) -> float:
        """One worker receives the ``bits`` of everyone else."""
        return self.seconds((n - 1) * bits) if n > 1 else 0.0

    def broadcast(self, bits: float, n: int) -> float:
        """One worker's ``bits`` reach everyone."""
        hops = math.ceil(math.log2(n)) if n > 1 else 0
        return hops * self.seconds(bits)

    def exchange(self, mode: Mode, payload: float, n: int, full: float = 0.0) -> float:
        """One averaging of n vectors that are sent as ``payload`` bits; ``full``: bits of the vector in full precision (ps)."""
        if n == 1:
            return 0.0
        if mode == "allreduce":
            return self.allreduce(payload, n)
        if mode == "alltoall":
            return self.alltoall(payload, n) + self.allgather(payload / n, n)
        if mode == "ps":
            return self.gather(payload, n) + self.broadcast(full, n)
        return self.allgather(payload, n)


def cheaper(link: Link, payload: float, n: int) -> Literal["allgather", "alltoall"]:
    """How n messages that cannot be added as they are reach everyone soonest; all-gather where it makes no difference.

    All-gather has half the messages, all-to-all 2/n of the bits: it wins where (1 - 2/n) payload / B > alpha.
    """
    return "alltoall" if link.exchange("alltoall", payload, n) < link.exchange("allgather", payload, n) else "allgather"


def parse_bandwidth(text: str, where: str = "--bandwidth") -> float:
    """Bits per second of ``1Gbit``, ``100 Mbit/s``, ``25Gbps`` or ``125MByte``. Raises UsageError."""
    found = _RATE.match(text)
    unit = (found[3] or "").lower() if found else ""
    value = float(found[1]) * _POWERS[found[2].lower()] * (8 if unit.startswith("byte") else 1) if found else 0.0
    if not unit or unit in ("b", "b/s") or not 0 < value < math.inf:
        raise UsageError(Issue(where, "must be a positive rate with its unit", text, "for example 100Mbit, 1Gbit or 25Gbps"))
    return value


def parse_time(text: str, where: str = "--latency") -> float:
    """Seconds of ``50us``, ``2ms`` or ``0s``. Raises UsageError."""
    found = _TIME.match(text)
    if not found or not math.isfinite(float(found[1])):
        raise UsageError(Issue(where, "must be a time with its unit", text, "for example 50us, 1.5ms or 0s"))
    return float(found[1]) * _SECONDS[found[2].lower()]


def rate_text(bits: float) -> str:
    """``bits`` per second as people write it."""
    for power, name in ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= power:
            return f"{bits / power:.3g} {name}"
    return f"{bits:.3g} bit/s"
