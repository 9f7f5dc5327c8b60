"""What a real party answers: checks of every message, and its own contribution to a sum. The other half of its port is party.py."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xutrain.errors import Diverged
from xutrain.methods.vertical.losses import Array
from xutrain.methods.vertical.plan import Plan
from xutrain.methods.vertical.seat import Seat
from xutrain.methods.vertical.security import fixed
from xutrain.methods.vertical.security.pairwise import Pairwise, agreed_key, chacha
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.rounds import Rates, Rounds
from xutrain.methods.vertical.transports.tree_sum import TreeSums
from xutrain.methods.vertical.transports.wire import Counters, Envelope, Refused


@dataclass
class Peer:
    """What is known of another party."""

    session: bytes = b""
    heard: float = 0.0
    lost: str = ""
    needs_reference: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Answers:
    """Messages in. The attributes are PartyPort's."""

    plan: Plan
    seat: Seat
    test: Any
    security: str
    facts: dict[str, Any]
    step_s: float
    name: str
    index: int
    session: bytes
    peers: dict[str, Peer]
    masks: Pairwise
    link: Link
    events: queue.Queue[tuple[str, int, Any]]
    block: threading.RLock
    seen: Counters
    rounds: Rounds
    rates: Rates | None
    steps_of: dict[str, int]
    read_by: dict[str, int]
    own_read: int
    trees: TreeSums | None
    finished: set[str]
    stopped: str
    fault: Diverged | None
    applied: int
    _known: Counters
    _turn: threading.Lock
    _private: Any

    def suffice(self, responders: int) -> bool:
        """Whether sums may go on with so many responders."""
        raise NotImplementedError

    def count(self, to: str, part: str, bits: int, masked: bool) -> None:
        """Enter a message that leaves into the ledger."""
        raise NotImplementedError

    def hello(self) -> Envelope:
        """This party's greeting."""
        raise NotImplementedError

    def heard(self, p: str) -> None:
        self.peers[p].heard = time.monotonic()

    def meet_peer(self, p: str, e: Envelope) -> None:
        """Take a party's session. Raises Refused where its facts do not agree with ours."""
        if len(e.sessions) != 2 or len(e.sessions[0]) != 8 or len(e.sessions[1]) != 32:
            raise Refused("a greeting without session and key")
        if e.facts.get("model") != self.facts.get("model"):
            raise Refused(f"{p} has a model of another run or of other rows: score with the models of one training")
        for name in ("rows", "order"):
            if e.facts.get(name) != self.facts[name]:
                what = "number of rows" if name == "rows" else "order of the ids"
                raise Refused(f"{p} has another {what}: align first (xutrain vertical align)")
        peer = self.peers[p]
        fresh = None
        if peer.session != e.sessions[0]:
            try:
                fresh = chacha(agreed_key(self._private.private_bytes_raw(), e.sessions[1], self.link.run))
            except ValueError as reason:  # a point of small order
                raise Refused(f"a greeting whose key is none: {reason}") from None
        if p in self.steps_of:
            marks = e.facts.get("rounds")
            for what in ("step", "pass"):
                if isinstance(marks, dict) and self._may_be(marks.get(what)):
                    self.events.put(("turn", marks[what], (p, what)))
            if self._may_be(e.facts.get("asked")):
                self.steps_of[p] = max(self.steps_of[p], e.facts["asked"])
        peer.facts, peer.needs_reference = e.facts, bool(e.facts.get("needs_reference"))
        if fresh is not None:
            with self.block:
                self.masks.streams[self.plan.names.index(p)] = fresh
                peer.session = e.sessions[0]
        self.heard(p)

    def _may_be(self, steps: object) -> bool:
        """Whether a label holder can have come so far."""
        return isinstance(steps, int) and 0 <= steps <= self.plan.most_steps

    def handle(self, e: Envelope) -> Envelope:
        """The answer to a checked envelope. Raises Refused; then nothing has changed."""
        try:
            return self._handle(e)
        except Diverged as error:  # a product that the masks cannot hold: this party's run is over, and the asker is told why
            self.fault = error
            raise Refused(error.issues[0].what) from None

    def _handle(self, e: Envelope) -> Envelope:
        self.heard(e.sender)
        sender = self.plan.names.index(e.sender)
        if e.kind == "hello":
            self.meet_peer(e.sender, e)
            return self.hello()
        if e.kind == "ping":
            return Envelope("ping")
        if e.kind == "done":
            self.finished.add(e.sender)
            self.rounds.finish(e.sender)
            for what in ("step", "pass"):
                self.events.put(("turn", 0, (e.sender, what)))
            return Envelope("ping")
        if e.kind == "stop":
            self.stopped = f"{e.sender}: {str(e.facts.get('reason', ''))[:300]}"
            return Envelope("ping")
        if not self.peers[e.sender].session:
            raise Refused("not greeted yet")
        if self.trees and e.kind in ("ask", "ask_all", "evaluate", "mask"):
            return self.trees.answer(e, sender)
        if sender not in self.plan.active:
            raise Refused(f"{e.sender} holds no labels and may not ask")
        if e.kind in ("ask", "ask_all", "evaluate"):
            return self._answer(e, sender)
        if e.kind == "tell":
            return self._told(e, sender)
        if e.kind == "refer":
            return self._referred(e, sender)
        if e.kind == "meet" and self.seat.holds_labels and e.facts.get("what") in ("step", "pass") and self._may_be(e.number):
            self.events.put(("turn", e.number, (e.sender, e.facts["what"])))
            return Envelope("ping")
        raise Refused(f"{e.kind} has no place in training")

    def _answer(self, e: Envelope, sender: int) -> Envelope:
        self._check_sessions(e)
        value = self.product(e, seen=True)
        flat: NDArray = value.ravel()
        if self.security == "pairwise":
            responders = [self.plan.names.index(p) for p in e.parties]
            with self.block:
                flat = fixed.encode(flat, self.plan.q) + self.masks.mask(sender, e.request, responders, flat.size)
        self.count(e.sender, self.part(e), 64 * flat.size, self.security == "pairwise" and len(e.parties) > 1)
        return Envelope(e.kind, number=e.number, request=e.request, values=flat)

    @staticmethod
    def part(e: Envelope) -> str:
        """What the ledger calls the answer to a request."""
        return {"ask": "product", "ask_all": "pass", "evaluate": "evaluation"}[e.kind]

    def product(self, e: Envelope, seen: bool = False) -> Array:
        """This party's bare contribution to a request. Raises Refused; ``seen``: each request number of a sender is answered once."""
        rows = self._rows(e) if e.kind == "ask" else None
        split = str(e.facts.get("split")) if e.kind == "evaluate" else ""
        if e.kind == "evaluate" and split not in ("train", "test"):
            raise Refused("evaluation of an unknown split")
        if seen:
            self.seen.accept(e.sender, e.request)
        asker = str(e.facts.get("requester", e.sender))
        if e.kind == "ask" and asker in self.steps_of:
            if self.rates is not None and e.number >= self.steps_of[asker]:
                self.rates.note(asker)
            self.steps_of[asker] = max(self.steps_of[asker], e.number + 1)
        with self.block:
            value = self._outlook(split) if split else self.seat.method.contribution(rows)
            if e.kind == "ask" and asker in self.read_by:
                self.read_by[asker] = max(self.read_by[asker], e.number + 1)
        return value

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
            if p == e.sender or not known or session != known:
                raise Refused(f"stale session of {p[:40]}: greet again")

    def _rows(self, e: Envelope) -> NDArray[np.int64]:
        rows = e.rows
        if rows is None or not len(rows) or len(rows) > self.plan.n or int(rows.max()) >= self.plan.n:
            raise Refused("rows that do not exist")
        if e.number >= self.plan.most_steps:
            raise Refused(f"step {e.number} of {self.plan.most_steps}")
        return rows.astype(np.int64)

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.plan.classes) if self.plan.classes else (rows,)

    def _told(self, e: Envelope, sender: int) -> Envelope:
        rows = self._rows(e)
        if not self.plan.backward or e.values is None or e.values.dtype != np.float64 or e.values.shape != self._shape(len(rows)):
            raise Refused("a signal of the wrong shape, or in a run without backward updating")
        until = time.monotonic() + self.link.timeout_s / 2
        while self.plan.mode == "sync" and not self.all_read(e.number, but=e.sender) and time.monotonic() < until:
            time.sleep(0.001)
        with self._turn:
            if self._first(e):
                if self.step_s:
                    time.sleep(self.step_s)
                with self.block:
                    self.seat.method.apply(rows, e.values)
                    self.applied += 1
        return Envelope("ping")

    def _first(self, e: Envelope) -> bool:
        """False for what this start of the sender has sent before, whose acknowledgement it did not get in time."""
        try:
            self._known.accept(f"{e.sender} {self.peers[e.sender].session.hex()} {e.kind}", e.number + 1)
        except Refused:
            return False
        return True

    def all_read(self, k: int, but: str = "") -> bool:
        """Whether every label holder (but the one whose signal it is; then this party too) has read this block for its step k."""
        own = not but or self.own_read > k or self.seat.taken >= self.plan.steps
        return own and all(max(read, self.rounds.marks[p, "step"]) > k for p, read in self.read_by.items() if p != but)

    def _referred(self, e: Envelope, sender: int) -> Envelope:
        if sender != self.plan.leader or e.values is None or e.values.dtype != np.float64 or e.values.shape != self._shape(self.plan.n):
            raise Refused("a reference of the wrong shape, or not from the leader")
        if self.seat.holds_labels:
            if e.number > self.seat.referred and self._first(e):  # else it has had this one, maybe of an earlier start of the leader
                self.events.put(("refreshed", e.number - 1, e.values))
        else:
            with self._turn, self.block:
                self.seat.refreshed(self, e.values)  # type: ignore[arg-type]
                self.applied += 1
        return Envelope("ping")
