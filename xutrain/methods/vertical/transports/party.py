"""A real party's port: its seat's wishes become calls to the other parties, and their calls become answers from its own block.

What leaves: masked products (to label holders that ask), signals and reference values (from label holders), and facts for agreement.
What is refused: everything from a party that may not ask, rows that do not exist, sessions that are not current, requests seen before.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xutrain.methods.vertical.ledger import Ledger
from xutrain.methods.vertical.losses import Array
from xutrain.methods.vertical.plan import Plan
from xutrain.methods.vertical.seat import Seat
from xutrain.methods.vertical.security import Message, fixed
from xutrain.methods.vertical.security.pairwise import Pairwise, agreed_key, chacha
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.wire import Counters, Envelope, Refused


@dataclass
class Peer:
    """What is known of another party."""

    session: bytes = b""
    heard: float = 0.0
    lost: str = ""
    needs_reference: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sum:
    """A sum under way at its requester."""

    what: str  # "answered", "summed" or an evaluation's split
    number: int
    e: Envelope
    own: Array
    replies: dict[str, NDArray] = field(default_factory=dict)


class PartyPort:
    """The port of one real party.

    Args:
        seat: this party's seat. test: this party's test rows. security: "pairwise" or "plain".
        facts: what the others must agree with (row count, hash of the row order) and may know.
        step_s: artificial computing time of one step, for experiments with stragglers.
        go_on: sum without a lost party while the others suffice to hide each other; its block's share is then missing.
    """

    def __init__(
        self, plan: Plan, seat: Seat, test: Any, security: str, facts: dict[str, Any], *, step_s: float = 0.0, go_on: bool = False
    ) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.plan, self.seat, self.test, self.security, self.facts, self.step_s, self.go_on = (
            plan,
            seat,
            test,
            security,
            facts,
            step_s,
            go_on,
        )
        self.name, self.index = plan.names[seat.party], seat.party
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()
        self.session = os.urandom(8)
        self.peers = {p: Peer() for p in plan.names if p != self.name}
        self.masks = Pairwise(self.index, {})
        self.link: Link
        self.events: queue.Queue[tuple[str, int, Any]] = queue.Queue()
        self.block = threading.RLock()  # the weights are never read while they are written
        self._books = threading.Lock()
        self._turn = threading.Lock()  # signals are worked off one by one
        self._requests = time.time_ns()  # a request number is never used twice, not even by a later start of this party
        self._seen = Counters()
        self.sums: dict[int, Sum] = {}
        self.unsent: list[tuple[str, Envelope]] = []
        self.tells: dict[int, int] = {}
        self.ledger = Ledger()
        self.applied = self.snapshots = 0
        self.finished: set[str] = set()
        self.stopped = ""

    # what the seat asks for -----------------------------------------------------------------------------------------------

    def claim(self, party: int) -> bool:
        return True

    def ask(self, party: int, k: int) -> None:
        rows = self.plan.rows(party, k)
        with self.block:
            own = self.seat.method.contribution(rows)
        self._sum(Sum("answered", k, Envelope("ask", number=k, rows=rows.astype(np.uint32)), own))

    def work(self, party: int, k: int) -> None:
        if self.step_s:
            time.sleep(self.step_s)
        self.events.put(("worked", k, None))

    def tell(self, party: int, k: int, signal: Array) -> None:
        self.tells[k] = len(self.peers)
        for p in self.peers:
            self._send(p, Envelope("tell", number=k, rows=self.plan.rows(party, k).astype(np.uint32), values=signal), "signal")

    def meet(self, party: int, what: str) -> None:
        self.events.put(("met", 0, what))  # over the network there is one label holder where rounds are kept

    def wrote(self, party: int) -> None:
        plan, taken = self.plan, self.seat.taken
        if plan.passes == "rolling" and party == plan.leader and taken % plan.inner == 0 and taken < plan.steps:
            self.sum_all(taken // plan.inner - 1)

    def sum_all(self, number: int) -> None:
        with self.block:
            own = self.seat.method.contribution()
        self._sum(Sum("summed", number, Envelope("ask_all", number=number), own))

    def refer(self, number: int, totals: Array, signal: Array) -> None:
        for p in self.peers:
            holder = self.plan.names.index(p) in self.plan.active
            if (holder and number >= 0) or (not holder and self.plan.backward):
                self._send(p, Envelope("refer", number=number + 1, values=totals if holder else signal), "reference")
        if number >= 0:
            self.events.put(("refreshed", number, totals))

    def evaluate(self, split: str) -> None:
        """Sum predictions of a split, and the squared norms of the weights; ends in an event "evaluated"."""
        self._sum(Sum(split, 0, Envelope("evaluate", facts={"split": split}), self._outlook(split)))

    # messages out -----------------------------------------------------------------------------------------------------------

    def _sum(self, wanted: Sum) -> None:
        """Ask all others under a new request number; a retry of the same sum takes another number."""
        self._requests += 1
        there = [p for p, peer in self.peers.items() if not peer.lost]
        responders = there if self.suffice(len(there)) else list(self.peers)
        wanted.replies.clear()
        wanted.e.request, wanted.e.parties, wanted.e.sessions = self._requests, responders, [self.peers[p].session for p in responders]
        self.sums[self._requests] = wanted
        if any(self.peers[p].lost for p in responders):
            return  # issued again when they are back
        rows = 0 if wanted.e.rows is None else 32 * len(wanted.e.rows)
        for p in responders:
            if rows:
                self._count(p, "index", rows, False)
            self._call(p, wanted.e, self._requests)

    def _call(self, p: str, e: Envelope, request: int) -> None:
        copy = Envelope(e.kind, number=e.number, request=e.request, parties=e.parties, sessions=e.sessions, rows=e.rows, facts=e.facts)

        def done(reply: Envelope | None, reason: str) -> None:
            self.events.put(("reply", request, (p, reply, reason)))

        self.link.call(p, copy, done)

    def _send(self, p: str, e: Envelope, part: str) -> None:
        """A message that is only acknowledged; kept and sent again where the party is away."""

        def done(reply: Envelope | None, reason: str) -> None:
            self.events.put(("sent", e.number if e.kind == "tell" else -1, (p, e, reply is not None, reason)))

        if self.peers[p].lost:
            if self.go_on:  # it will go on from its own state when it is back
                self.events.put(("sent", e.number if e.kind == "tell" else -1, (p, e, True, "")))
            else:
                self.unsent.append((p, e))
            return
        self._count(p, part, e.payload_bits(), False)
        self.link.call(p, Envelope(e.kind, number=e.number, rows=e.rows, values=e.values, facts=e.facts), done)

    def _count(self, to: str, part: str, bits: int, masked: bool) -> None:
        with self._books:
            self.ledger.add([Message(self.index, self.plan.names.index(to), part, bits, masked)])

    def replied(self, request: int, p: str, reply: Envelope | None, reason: str) -> None:
        """One answer to a sum under way; the last one completes it."""
        wanted = self.sums.get(request)
        if wanted is None:
            return
        if reply is None or reply.values is None:
            self.away(p, reason)
            return
        self.heard(p)
        wanted.replies[p] = reply.values.ravel()
        if len(wanted.replies) < len(wanted.e.parties):
            return
        del self.sums[request]
        parts = [wanted.replies[q] for q in wanted.e.parties]
        if any(part.size != wanted.own.size for part in parts):
            raise Refused(f"answers of different length to request {wanted.what} {wanted.number}")
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        others = fixed.decode(total) if self.security == "pairwise" else total
        totals = wanted.own + others.reshape(wanted.own.shape)
        if wanted.e.kind == "evaluate":
            self.events.put(("evaluated", wanted.number, (wanted.what, totals)))
        else:
            self.events.put((wanted.what, wanted.number, totals))

    def delivered(self, k: int, p: str, e: Envelope, ok: bool, reason: str) -> None:
        """An acknowledgement, or the news that a message did not arrive."""
        if not ok:
            self.away(p, reason)
            if not self.go_on:
                self.unsent.append((p, e))
                return
        elif not self.peers[p].lost:
            self.heard(p)
        if k >= 0:
            self.tells[k] -= 1
            if self.tells[k] == 0:
                del self.tells[k]
                self.events.put(("acked", k, None))

    def away(self, p: str, reason: str) -> None:
        """A party does not answer: what it owes is asked again when it is back. A refusal that greeting cannot mend ends the run."""
        if reason.startswith("refused") and "greet" not in reason:
            self.stopped = f"{p} {reason}"
        if not self.peers[p].lost:
            self.peers[p].lost = reason or "no answer"
            if self.suffice(sum(not peer.lost for peer in self.peers.values())):
                self._again()

    def suffice(self, responders: int) -> bool:
        """Whether sums may go on with so many responders: two of them hide each other."""
        return self.go_on and responders >= (2 if self.security == "pairwise" else 1)

    def _again(self) -> None:
        """Ask anew for every sum under way, each under a new request number."""
        owed, self.sums = list(self.sums.values()), {}
        for wanted in owed:
            self._sum(wanted)

    def heard(self, p: str) -> None:
        self.peers[p].heard = time.monotonic()

    def back(self, p: str) -> None:
        """A lost party answers again: send what was kept, ask again what is owed."""
        self.peers[p].lost = ""
        self.heard(p)
        kept, self.unsent = [m for m in self.unsent if m[0] == p], [m for m in self.unsent if m[0] != p]
        for _, e in kept:
            self._send(p, e, {"tell": "signal"}.get(e.kind, "reference"))
        if not any(peer.lost for peer in self.peers.values()):
            self._again()

    def greet(self, p: str) -> None:
        """Exchange session keys and facts with a party; the answer comes as an event."""

        def done(reply: Envelope | None, reason: str) -> None:
            self.events.put(("greeted", 0, (p, reply, reason)))

        self.link.call(p, self._hello(), done, timeout_s=min(2.0, self.link.timeout_s))

    def _hello(self) -> Envelope:
        return Envelope("hello", sessions=[self.session, self.public], facts={**self.facts, "needs_reference": self.applied == 0})

    # messages in ------------------------------------------------------------------------------------------------------------

    def meet_peer(self, p: str, e: Envelope) -> None:
        """Take a party's session. Raises Refused where its facts do not agree with ours."""
        if len(e.sessions) != 2 or len(e.sessions[0]) != 8 or len(e.sessions[1]) != 32:
            raise Refused("a greeting without session and key")
        for name in ("rows", "order"):
            if e.facts.get(name) != self.facts[name]:
                what = "number of rows" if name == "rows" else "order of the ids"
                raise Refused(f"{p} has another {what}: align first (xutrain vertical align)")
        peer = self.peers[p]
        peer.facts, peer.needs_reference = e.facts, bool(e.facts.get("needs_reference"))
        if peer.session != e.sessions[0]:
            with self.block:
                key = agreed_key(self._private.private_bytes_raw(), e.sessions[1], self.link.run)
                self.masks.streams[self.plan.names.index(p)] = chacha(key)
                peer.session = e.sessions[0]
        self.heard(p)

    def handle(self, e: Envelope) -> Envelope:
        """The answer to a checked envelope. Raises Refused; then nothing has changed."""
        self.heard(e.sender)
        sender = self.plan.names.index(e.sender)
        if e.kind == "hello":
            self.meet_peer(e.sender, e)
            return self._hello()
        if e.kind == "ping":
            return Envelope("ping")
        if e.kind == "done":
            self.finished.add(e.sender)
            return Envelope("ping")
        if e.kind == "stop":
            self.stopped = f"{e.sender}: {str(e.facts.get('reason', ''))[:300]}"
            return Envelope("ping")
        if not self.peers[e.sender].session:
            raise Refused("not greeted yet")
        if sender not in self.plan.active:
            raise Refused(f"{e.sender} holds no labels and may not ask")
        if e.kind in ("ask", "ask_all", "evaluate"):
            return self._answer(e, sender)
        if e.kind == "tell":
            return self._told(e, sender)
        if e.kind == "refer":
            return self._referred(e, sender)
        raise Refused(f"{e.kind} has no place in training")

    def _answer(self, e: Envelope, sender: int) -> Envelope:
        self._check_sessions(e)
        rows = self._rows(e) if e.kind == "ask" else None
        split = str(e.facts.get("split")) if e.kind == "evaluate" else ""
        if e.kind == "evaluate" and split not in ("train", "test"):
            raise Refused("evaluation of an unknown split")
        self._seen.accept(e.sender, e.request)
        with self.block:
            value = self._outlook(split) if split else self.seat.method.contribution(rows)
            flat: NDArray = value.ravel()
            if self.security == "pairwise":
                responders = [self.plan.names.index(p) for p in e.parties]
                flat = fixed.encode(flat, self.plan.q) + self.masks.mask(sender, e.request, responders, flat.size)
        kind = {"ask": "product", "ask_all": "pass", "evaluate": "evaluation"}[e.kind]
        self._count(e.sender, kind, 64 * flat.size, self.security == "pairwise" and len(e.parties) > 1)
        return Envelope(e.kind, number=e.number, request=e.request, values=flat)

    def _outlook(self, split: str) -> Array:
        with self.block:
            method = self.seat.method
            value = method.contribution() if split == "train" else method.predict(self.test)
            return np.append(value.ravel(), np.square(method.weights).sum())

    def _check_sessions(self, e: Envelope) -> None:
        if self.name not in e.parties or len(set(e.parties)) != len(e.parties) or len(e.parties) != len(e.sessions):
            raise Refused("a request must name each responder once, with its session")
        if len(e.parties) < self.plan.q - 1 and not self.suffice(len(e.parties)):
            raise Refused(f"only {len(e.parties)} responders: this run sums over more parties")
        for p, session in zip(e.parties, e.sessions, strict=True):
            known = self.session if p == self.name else self.peers[p].session if p in self.peers else b""
            if p == e.sender or session != known:
                raise Refused(f"stale session of {p[:40]}: greet again")

    def _rows(self, e: Envelope) -> NDArray[np.int64]:
        rows = e.rows
        if rows is None or not len(rows) or len(rows) > self.plan.n or int(rows.max()) >= self.plan.n:
            raise Refused("rows that do not exist")
        return rows.astype(np.int64)

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.plan.classes) if self.plan.classes else (rows,)

    def _told(self, e: Envelope, sender: int) -> Envelope:
        rows = self._rows(e)
        if not self.plan.backward or e.values is None or e.values.dtype != np.float64 or e.values.shape != self._shape(len(rows)):
            raise Refused("a signal of the wrong shape, or in a run without backward updating")
        with self._turn:
            if self.step_s:
                time.sleep(self.step_s)
            with self.block:
                self.seat.method.apply(rows, e.values)
                self.applied += 1
        return Envelope("ping")

    def _referred(self, e: Envelope, sender: int) -> Envelope:
        if sender != self.plan.leader or e.values is None or e.values.dtype != np.float64 or e.values.shape != self._shape(self.plan.n):
            raise Refused("a reference of the wrong shape, or not from the leader")
        if self.seat.holds_labels:
            self.events.put(("refreshed", e.number - 1, e.values))
        else:
            with self._turn, self.block:
                self.seat.refreshed(self, e.values)
                self.applied += 1
        return Envelope("ping")
