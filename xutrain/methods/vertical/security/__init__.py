"""How a sum of private products is taken: plain, over two trees, or with pairwise masks; what it costs, and who can learn what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xutrain.methods.vertical.security import fixed, trees
from xutrain.methods.vertical.security.pairwise import Pairwise, Stream, chacha, has_cryptography, philox, simulated_key

if TYPE_CHECKING:
    from xutrain.methods.vertical.plan import Plan

#: Bits of one scalar (float64, or an element of the ring) and of one row index.
SCALAR, INDEX = 64, 32


@dataclass(frozen=True)
class Message:
    """Messages of one kind from one party to another: how many, how many bits of payload."""

    source: int
    target: int
    part: str
    bits: int
    masked: bool


class SafeSum:
    """Sums of one number (or vector) per party, as the requester gets them, in a simulation.

    Args:
        mode: "plain", "tree" or "pairwise". parties: q. seed: of the simulated keys and masks.
    """

    def __init__(
        self, mode: str, parties: int, seed: int = 0, trees_kind: str = "auto", t1: list[int] | None = None, t2: list[int] | None = None
    ) -> None:
        self.mode = mode if parties > 1 else "plain"
        self.parties, self.seed = parties, seed
        self.trees = trees.pair(trees_kind, parties, t1, t2) if self.mode == "tree" else None
        self.stream_name = ""
        self.masks: list[Pairwise] = []
        if self.mode == "pairwise":
            make = chacha if has_cryptography() else philox
            self.stream_name = "ChaCha20" if make is chacha else "Philox (the cryptography package is not installed)"
            shared: dict[tuple[int, int], Stream] = {
                (a, b): make(simulated_key(seed, a, b)) for a in range(parties) for b in range(a + 1, parties)
            }
            self.masks = [Pairwise(p, {o: shared[min(p, o), max(p, o)] for o in range(parties) if o != p}) for p in range(parties)]

    @property
    def hops(self) -> int:
        """Messages in a row from the last party to the requester."""
        return self.trees.hops if self.trees else 1

    def send(self, party: int, value: NDArray[np.float64], requester: int, request: int) -> NDArray:
        """What ``party`` emits for a request: (1, m) float64 or ring elements, or (2, m) with masks; the requester's own is bare."""
        flat = value.ravel()
        if self.mode == "plain":
            return flat[None]
        ring = fixed.encode(flat, self.parties)
        if self.mode == "tree":
            mask = philox(simulated_key(self.seed, party, party))(requester, request, len(flat))
            return np.stack([ring + mask, mask])
        if party != requester:
            ring += self.masks[party].mask(requester, request, [p for p in range(self.parties) if p != requester], len(flat))
        return ring[None]

    def combine(self, sent: list[NDArray], shape: tuple[int, ...]) -> NDArray[np.float64]:
        """The requester's total from all parties' ``send``, in party order."""
        if self.mode == "plain":
            total = sent[0][0].copy()
            for part in sent[1:]:
                total += part[0]
            return total.reshape(shape)
        ring = sent[0].copy()
        for part in sent[1:]:
            ring += part
        return fixed.decode(ring[0] - ring[1] if self.mode == "tree" else ring[0]).reshape(shape)

    def messages(self, requester: int, rows: int, scalars: int, part: str) -> list[Message]:
        """All messages of one sum: the announced row indices (none for a full pass: ``rows`` 0), the values, and the trees' masks."""
        q = self.parties
        others = [p for p in range(q) if p != requester]
        found = [Message(requester, p, "index", INDEX * rows, False) for p in others] if rows else []
        if self.trees is None:
            return [*found, *(Message(p, requester, part, SCALAR * scalars, self.mode == "pairwise" and q > 2) for p in others)]
        turn = [(p + requester) % q for p in range(q)]  # the trees are written for requester 0
        for parents, kind in ((self.trees.t1, part), (self.trees.t2, "masks")):
            for p in range(q):
                if parents[p] != -1:
                    found.append(Message(turn[p], turn[parents[p]], kind, SCALAR * scalars, True))
                elif p != 0:
                    found.append(Message(turn[p], requester, kind, SCALAR * scalars, True))
        return found

    def statement(self, plan: Plan, loss: str, widths: list[int]) -> list[str]:
        """Who can learn what in a run. ``widths``: columns of each party."""
        holders = [plan.names[p] for p in plan.active]
        unknown = min((sum(widths) - widths[p] for p in plan.active), default=0)  # columns that a requester does not hold
        totals = max(1, plan.classes - 1) * plan.totals_per_sample  # a softmax total holds several numbers
        said = []
        if self.parties == 1:
            return ["one party: nothing travels"]
        if self.mode == "plain":
            said.append("PLAIN sums: a requester sees every other party's product of every sample it asks for; nothing is hidden")
        elif self.parties == 2:
            said.append("two parties: masks protect nothing, for the total minus one's own product is the other's product")
        elif self.mode == "pairwise":
            said.append(
                f"pairwise masks: a requester learns the sum of the other {self.parties - 1} parties' products; "
                f"it needs {self.parties - 2} of them as accomplices to learn one product"
            )
        else:
            assert self.trees is not None
            size = len(self.trees.breaking) if self.trees.breaking else 0
            said.append(
                f"two trees: no single party learns more than the total; a coalition of {size} does"
                if size
                else "two trees: no coalition of up to three parties learns more than its own products and the total"
            )
        if plan.backward and loss == "logistic":
            said.append("every collaborator reads the labels of the samples it is sent: the sign of theta is the label")
        if totals >= unknown:
            said.append(
                f"each requester ({', '.join(holders)}) sees {math.ceil(totals)} totals per sample and the others hold "
                f"{unknown} columns: with as many totals as columns, and that many known customers, the others' features can be "
                "solved for (xutrain vertical audit --attack totals)"
            )
        return said
