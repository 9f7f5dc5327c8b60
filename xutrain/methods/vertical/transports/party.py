"""A real party's port: its seat's wishes become calls to the other parties, and their calls become answers from its own block.

What leaves: masked products (to label holders that ask), signals and reference values (from label holders), and facts for agreement.
Answers and what is refused: answers.py.
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
from xutrain.methods.vertical.security.pairwise import Pairwise
from xutrain.methods.vertical.security.trees import TreePair
from xutrain.methods.vertical.transports.answers import Answers, Peer
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.rounds import Rates, Rounds
from xutrain.methods.vertical.transports.tree_sum import MASKS, SUM, TreeSums
from xutrain.methods.vertical.transports.wire import Counters, Envelope, Refused


@dataclass
class Sum:
    """A sum under way at its requester."""

    what: str  # "answered", "summed" or an evaluation's split
    number: int
    e: Envelope
    own: Array
    asked: list[tuple[int, str]] = field(default_factory=list)  # whom, and over which tree
    replies: dict[tuple[int, str], NDArray] = field(default_factory=dict)


class PartyPort(Answers):
    """The port of one real party.

    Args:
        seat: this party's seat. test: this party's test rows. security: "pairwise", "tree" or "plain". pair: the trees.
        facts: what the others must agree with (row count, hash of the row order) and may know.
        step_s: artificial computing time of one step, for experiments with stragglers.
        go_on: sum without a lost party while the others suffice to hide each other; its block's share is then missing.
        longest: the longest stable step of this party's block, for compensated rates; 0 leaves the step size alone.
    """

    def __init__(
        self, plan: Plan, seat: Seat, test: Any, security: str, facts: dict[str, Any], *,
        step_s: float = 0.0, go_on: bool = False, pair: TreePair | None = None, longest: float = 0.0,
    ) -> None:  # fmt: skip
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.plan, self.seat, self.test, self.security, self.facts = plan, seat, test, security, facts
        self.step_s, self.go_on = step_s, go_on
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
        self.seen, self._known = Counters(), Counters()
        self.sums: dict[int, Sum] = {}
        self.unsent: list[tuple[str, Envelope]] = []
        self.tells: dict[int, int] = {}
        self.ledger = Ledger()
        self.applied = self.snapshots = 0
        self.finished: set[str] = set()
        self.stopped = ""
        self.fault = None
        holders = [plan.names[p] for p in plan.active]
        self.rounds = Rounds(p for p in holders if p != self.name)
        self.rates = Rates(seat.method.lr, longest) if longest else None
        self.steps_of = {p: 0 for p in holders if p != self.name}
        self.read_by = dict(self.steps_of)  # steps for which each label holder has read this block, and this party itself
        self.own_read = 0 if seat.holds_labels else Rounds.DONE
        self.trees = TreeSums(self, pair) if pair is not None else None
        self._totals: tuple[int, Array] = (-1, np.zeros(0))

    # what the seat asks for -----------------------------------------------------------------------------------------------

    def claim(self, party: int) -> bool:
        """With a shared budget: what others have asked is known from their requests, so it is overdrawn by what is on the wire at most."""
        return self.plan.budget == "local" or self.seat.asked + sum(self.steps_of.values()) < self.plan.total_steps

    @property
    def complete(self) -> bool:
        """Whether this label holder has taken all its steps."""
        seat = self.seat
        return seat.taken >= self.plan.steps if self.plan.budget == "local" else seat.taken == seat.asked and not self.claim(self.index)

    def ask(self, party: int, k: int) -> None:
        rows = self.plan.rows(party, k)
        with self.block:
            own = self.seat.method.contribution(rows)
            self.own_read = max(self.own_read, k + 1)
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
        mark = 1 + (self.seat.rounds if what == "step" else self.seat.referred)
        self.rounds.own[what] = max(self.rounds.own[what], mark)
        for p in self.steps_of:
            self._send(p, Envelope("meet", number=mark, facts={"what": what}), "")
        self.reached(self.name, what, mark)

    def reached(self, p: str, what: str, mark: int) -> None:
        """A label holder has come to the end of ``mark`` rounds; when all have, the round is over."""
        self.rounds.reach(p, what, mark)
        number, totals = self._totals
        if what == "pass" and p != self.name and 0 <= mark - 1 == number < self.seat.referred and self.index == self.plan.leader:
            self._send(p, Envelope("refer", number=number + 1, values=totals), "reference")  # it went on from before this pass
        if self.rounds.met(what, self.seat.rounds if what == "step" else self.seat.referred):
            self.events.put(("met", 0, what))

    def wrote(self, party: int) -> None:
        plan, taken = self.plan, self.seat.taken
        if self.rates is not None:
            self.rates.note(self.name)
            self.seat.method.lr = self.rates.lr(self.name)
        if plan.passes == "rolling" and party == plan.leader and taken % plan.inner == 0 and taken < plan.steps:
            self.sum_all(taken // plan.inner - 1)

    def sum_all(self, number: int) -> None:
        with self.block:
            own = self.seat.method.contribution()
        self._sum(Sum("summed", number, Envelope("ask_all", number=number), own))

    def refer(self, number: int, totals: Array, signal: Array) -> None:
        self._totals = (number, totals)
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
        wanted.asked = self.trees.first(self.index) if self.trees else [(self.plan.names.index(p), SUM) for p in responders]
        wanted.e.request, wanted.e.parties, wanted.e.sessions = self._requests, responders, [self.peers[p].session for p in responders]
        self.sums[self._requests] = wanted
        if any(self.peers[p].lost for p in responders):
            return  # issued again when they are back
        rows = 0 if wanted.e.rows is None else 32 * len(wanted.e.rows)
        for at, tree in wanted.asked:
            if rows and tree == SUM:
                self.count(self.plan.names[at], "index", rows, False)
            self._call(at, tree, wanted, self._requests)

    def _call(self, at: int, tree: str, wanted: Sum, request: int) -> None:
        e, facts = wanted.e, dict(wanted.e.facts)
        if self.trees:
            facts |= {"tree": tree, "requester": self.name} | ({"count": int(wanted.own.size)} if tree == MASKS else {})
        copy = Envelope(
            "mask" if tree == MASKS else e.kind, number=e.number, request=e.request, parties=e.parties, sessions=e.sessions,
            rows=e.rows if tree == SUM else None, facts=facts,
        )  # fmt: skip

        def done(reply: Envelope | None, reason: str) -> None:
            self.events.put(("reply", request, (at, tree, reply, reason)))

        self.link.call(self.plan.names[at], copy, done)

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
        if bits := e.payload_bits():
            self.count(p, part, bits, False)
        self.link.call(p, Envelope(e.kind, number=e.number, rows=e.rows, values=e.values, facts=e.facts), done)

    def count(self, to: str, part: str, bits: int, masked: bool) -> None:
        with self._books:
            self.ledger.add([Message(self.index, self.plan.names.index(to), part, bits, masked)])

    def replied(self, request: int, at: int, tree: str, reply: Envelope | None, reason: str) -> None:
        """One answer to a sum under way; the last one completes it."""
        wanted, p = self.sums.get(request), self.plan.names[at]
        if wanted is None:
            return
        if reply is None or reply.values is None:
            lost = str(reply.facts.get("lost")) if reply is not None else ""
            self.away(lost if lost in self.peers else p, reason or f"not reached by {reply.facts.get('by') if reply else p}")
            return
        self.heard(p)
        wanted.replies[at, tree] = reply.values.ravel()
        if len(wanted.replies) < len(wanted.asked):
            return
        del self.sums[request]
        parts = [wanted.replies[key] for key in wanted.asked]
        if any(part.size != wanted.own.size for part in parts):
            raise Refused(f"answers of different length to request {wanted.what} {wanted.number}")
        if self.trees:
            totals = self.trees.total(self.index, request, wanted.own.ravel(), wanted.replies).reshape(wanted.own.shape)
        else:
            total = sum(parts[1:], parts[0].copy())
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
        return self.go_on and self.trees is None and responders >= (2 if self.security == "pairwise" else 1)

    def _again(self) -> None:
        """Ask anew for every sum under way, each under a new request number."""
        owed, self.sums = list(self.sums.values()), {}
        for wanted in owed:
            self._sum(wanted)

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

        self.link.call(p, self.hello(), done, timeout_s=min(2.0, self.link.timeout_s))

    def hello(self) -> Envelope:
        own = {"step": max(self.rounds.own["step"], self.seat.rounds), "pass": max(self.rounds.own["pass"], self.seat.referred)}
        facts = {**self.facts, "needs_reference": self.applied == 0, "asked": self.seat.asked, "rounds": own}
        facts["known"] = sum(bool(peer.session) for peer in self.peers.values())
        return Envelope("hello", sessions=[self.session, self.public], facts=facts)
