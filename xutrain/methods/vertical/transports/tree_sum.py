"""Sums over two trees between real parties: a request runs down a tree, masked partial sums come back up as its replies.

Down T1 goes the request itself (rows included), back come m_l = z_l + b_l, added up at every node; down T2 goes the number of scalars
alone, back come the masks b_l. The trees are written for party 0 as requester; for another one all parties are rotated. A party's masks
are ChaCha20 of a key that it never shows, under (requester, request), so that both trees carry the same mask and no mask serves twice.
An inner node speaks for the requester: parties follow the protocol here, as everywhere in this mode.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xutrain.methods.vertical.security import fixed
from xutrain.methods.vertical.security.pairwise import chacha
from xutrain.methods.vertical.security.trees import TreePair
from xutrain.methods.vertical.transports.wire import Envelope, Refused

if TYPE_CHECKING:
    from xutrain.methods.vertical.transports.party import PartyPort

SUM, MASKS = "sum", "masks"


class TreeSums:
    """One party's place in both trees, for every requester."""

    def __init__(self, port: PartyPort, pair: TreePair) -> None:
        self.port, self.pair = port, pair
        self._stream = chacha(os.urandom(32))

    def parents(self, tree: str, requester: int) -> list[int]:
        """Parent of every party, -1 for the root, when ``requester`` asks."""
        q, written = self.port.plan.q, self.pair.t1 if tree == SUM else self.pair.t2
        turned = [-1] * q
        for p, parent in enumerate(written):
            turned[(p + requester) % q] = -1 if parent == -1 else (parent + requester) % q
        return turned

    def mask(self, requester: int, request: int, count: int) -> NDArray[np.uint64]:
        return self._stream(requester, request, count)

    def first(self, requester: int) -> list[tuple[int, str]]:
        """Whom a requester asks, and for what: its children in T1, and in T2 its children or the root."""
        up, masks = self.parents(SUM, requester), self.parents(MASKS, requester)
        below = [(p, SUM) for p, parent in enumerate(up) if parent == requester]
        root = masks.index(-1)
        return below + ([(p, MASKS) for p, parent in enumerate(masks) if parent == root] if root == requester else [(root, MASKS)])

    def total(self, requester: int, request: int, own: NDArray, replies: dict[tuple[int, str], NDArray]) -> NDArray[np.float64]:
        """The requester's total: T1's sum with its own masked product, minus T2's sum with its own mask."""
        mask = self.mask(requester, request, own.size)
        ring = fixed.encode(own, self.port.plan.q) + mask
        for (_, tree), value in replies.items():
            ring = ring + value if tree == SUM else ring - value
        return fixed.decode(ring - mask if self.parents(MASKS, requester).index(-1) == requester else ring)

    def answer(self, e: Envelope, sender: int) -> Envelope:
        """This party's part of a request, its children's added. Raises Refused; a child that is away is named in the reply."""
        port, plan, tree = self.port, self.port.plan, str(e.facts.get("tree"))
        if e.facts.get("requester") not in plan.names or tree != (MASKS if e.kind == "mask" else SUM):
            raise Refused("a request over trees must say who asks and which tree")
        requester = plan.names.index(e.facts["requester"])
        if requester not in plan.active:
            raise Refused(f"{plan.names[requester]} holds no labels and may not ask")
        parents = self.parents(tree, requester)
        if sender != (requester if parents[port.index] == -1 else parents[port.index]):
            raise Refused(f"{e.sender} is not above this party in the tree")
        self._check_sessions(e, requester)
        value = port.product(e) if tree == SUM else None
        count = value.size if value is not None else e.facts.get("count")
        if not isinstance(count, int) or not 0 < count <= plan.scalars(max(plan.n, port.test.shape[0])) + 1:
            raise Refused("masks for an impossible number of scalars")
        port.seen.accept(f"{plan.names[requester]} {tree}", e.request)
        ring = self.mask(requester, e.request, count)
        if value is not None:
            ring = ring + fixed.encode(value.ravel(), plan.q)
        for p, reply in self._below(e, tree, requester).items():
            if reply is None or reply.values is None or reply.values.dtype != np.uint64 or reply.values.size != count:
                lost = str((reply.facts if reply is not None else {}).get("lost", p))[:80]
                return Envelope(e.kind, number=e.number, request=e.request, facts={"lost": lost, "by": port.name})
            ring = ring + reply.values.ravel()
        port.count(e.sender, "masks" if tree == MASKS else port.part(e), 64 * count, True)
        return Envelope(e.kind, number=e.number, request=e.request, values=ring)

    def _below(self, e: Envelope, tree: str, requester: int) -> dict[str, Envelope | None]:
        """Replies of this party's children, asked side by side; None where a child does not answer."""
        port, parents = self.port, self.parents(tree, requester)
        children = [port.plan.names[p] for p, parent in enumerate(parents) if parent == port.index]
        replies: dict[str, Envelope | None] = {}
        there = threading.Event()

        def done(child: str) -> Any:
            def take(reply: Envelope | None, reason: str) -> None:
                replies[child] = reply
                if len(replies) == len(children):
                    there.set()

            return take

        level, at = 1, port.index
        while parents[at] not in (-1, requester):
            level, at = level + 1, parents[at]
        patience = port.link.timeout_s * max(0.2, 1.0 - 0.2 * level)  # a deep child gives up before those above it
        for child in children:
            rows = 0 if e.rows is None else 32 * len(e.rows)
            if rows:
                port.count(child, "index", rows, False)
            copy = Envelope(e.kind, number=e.number, request=e.request, parties=e.parties, sessions=e.sessions, rows=e.rows, facts=e.facts)
            port.link.call(child, copy, done(child), timeout_s=patience)
        if children:
            there.wait(patience + 1.0)
        return {child: replies.get(child) for child in children}

    def _check_sessions(self, e: Envelope, requester: int) -> None:
        port, names = self.port, self.port.plan.names
        if e.parties != [p for p in names if p != names[requester]] or len(e.sessions) != len(e.parties):
            raise Refused("a request over trees must name every other party once, with its session")
        for p, session in zip(e.parties, e.sessions, strict=True):
            if not session or session != (port.session if p == port.name else port.peers[p].session):
                raise Refused(f"stale session of {p}: greet again")
        if requester == port.index and e.request not in port.sums:
            raise Refused("masks for a request that this party did not make")
