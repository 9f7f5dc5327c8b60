"""Deterministic virtual time: a heap of events, equal latencies, known computing times. No thread, no sleep, no clock.

A request leaves at t, every party's product is read at t + latency from its block as it is then (blocks are read between writes,
never torn), the total is back one hop later, and the step is written after the party's computing time. So a label holder has the period
2 latency + c, and a lock-step round takes 2 latency + max c, exactly. Collaborators work off signals one by one, in order of arrival.

Event times depend on computing times only, never on values: so each process of a torchrun job follows the same schedule, computes
the parties that it hosts, and exchanges (masked) products by one collective per read. Any number of processes gives the same bits.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xutrain.methods.vertical.ledger import Ledger
from xutrain.methods.vertical.losses import Array
from xutrain.methods.vertical.plan import Plan
from xutrain.methods.vertical.seat import Seat
from xutrain.methods.vertical.security import Message, SafeSum

#: Brings one array of every party together on every process, in party order; given those of the hosted parties.
Gather = Callable[[list[NDArray]], list[NDArray]]
PASS = 1 << 40  #: request numbers of full passes start here, so that no mask is used twice
Event = tuple[float, int, str, int, int, int]  # time, order, what, party, number, source


class VirtualTime:
    """The port of a simulation. ``compute[p]`` is party p's time per step, ``latency`` the one-way time of a message."""

    def __init__(
        self, plan: Plan, seats: list[Seat], safe: SafeSum, *, latency: float, compute: list[float], full_pass: float, gather: Gather
    ) -> None:
        self.plan, self.seats, self.safe, self.gather = plan, seats, safe, gather
        self.latency, self.compute, self.full_pass = latency, compute, full_pass
        self.heap: list[Event] = []
        self.now = 0.0
        self.order = self.claimed = self.steps = 0
        self.busy = [0.0] * plan.q
        self.mail: dict[str, Array] = {}
        self.left: Counter[str] = Counter()  # deliveries still to come of a piece of mail; arrivals at a meeting
        self.writes = [0] * plan.q
        self.read_at: dict[str, tuple[int, int]] = {}
        self.staleness = 0
        self.sent: Counter[tuple[str, int]] = Counter()
        self._hops = safe.hops if plan.exchange == "request" else math.ceil(math.log2(plan.q)) if plan.q > 1 else 0
        self._messages: dict[tuple[str, int], list[Message]] = {}
        self._flushed: Counter[tuple[str, int]] = Counter()

    # what seats ask for -------------------------------------------------------------------------------------------------

    def claim(self, party: int) -> bool:
        if self.plan.budget == "total" and self.claimed >= self.plan.total_steps:
            return False
        self.claimed += 1
        return True

    def ask(self, party: int, k: int) -> None:
        if self.plan.exchange == "request":
            self.sent["ask", party] += 1
            self._at(self.latency, "read", party, k)
            return
        self.left[f"all {k}"] += 1  # one tree for everybody, as soon as all are there
        if self.left[f"all {k}"] == self.plan.q:
            del self.left[f"all {k}"]
            self.sent["ask", 0] += 1
            self._at(self.latency * self._hops, "read", 0, k)

    def work(self, party: int, k: int) -> None:
        self._queue("worked", party, k, 0, self.compute[party])

    def tell(self, party: int, k: int, signal: Array) -> None:
        self.sent["tell", party] += 1
        others = [p for p in range(self.plan.q) if p != party]
        self.mail[f"signal {party} {k}"] = signal
        self.left[f"signal {party} {k}"] = len(others)
        for p in others:
            self._at(self.latency, "signal", p, k, party)

    def meet(self, party: int, what: str) -> None:
        self.left[f"meet {what}"] += 1
        if self.left[f"meet {what}"] == len(self.plan.active):
            del self.left[f"meet {what}"]
            for p in self.plan.active:
                self._at(0.0, f"met {what}", p)

    def wrote(self, party: int) -> None:
        self.steps += 1
        plan = self.plan
        if plan.passes == "rolling" and self.steps < plan.total_steps and self.steps % (plan.inner * len(plan.active)) == 0:
            self.sum_all(self.steps // (plan.inner * len(plan.active)) - 1)

    def sum_all(self, number: int) -> None:
        self.sent["pass", self.plan.leader] += 1
        self._at(self.latency if self.plan.exchange == "request" else self.latency * self._hops, "read all", self.plan.leader, number)

    def refer(self, number: int, totals: Array, signal: Array) -> None:
        plan, leader = self.plan, self.plan.leader
        if number < 0:
            self.sent["start", leader] += 1
        targets = list(plan.active) if number >= 0 else []
        targets += plan.collaborators if plan.backward else []
        self.mail[f"totals {number}"], self.mail[f"reference {number}"] = totals, signal
        self.left[f"reference {number}"] = len(targets)
        for p in targets:
            self._at(0.0 if p == leader or plan.exchange == "allreduce" else self.latency, "reference", p, number)
        self._forget_reference(number)

    # what happens -------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Let the next event happen; False when nothing is left to happen."""
        if not self.heap:
            return False
        self.now, _, what, party, k, source = heapq.heappop(self.heap)
        seat = self.seats[party]
        if what == "read":
            self.mail[f"total {party} {k}"] = self._read(party, k, self.plan.rows(party, k))
            for p in range(self.plan.q) if self.plan.exchange == "allreduce" else [party]:
                self.read_at[f"{p} {k}"] = (sum(self.writes), self.writes[p])
                self._at(self.latency * self._hops, "answered", p, k)
        elif what == "answered":
            asker = 0 if self.plan.exchange == "allreduce" else party
            totals = self.mail[f"total {asker} {k}"]
            if self.plan.exchange == "request" or party == self.plan.q - 1:
                del self.mail[f"total {asker} {k}"]
            seat.answered(self, k, totals)
        elif what == "worked":
            writes, own = self.read_at.pop(f"{party} {k}")
            self.staleness = max(self.staleness, (sum(self.writes) - self.writes[party]) - (writes - own))
            self.writes[party] += 1
            seat.worked(self, k)
        elif what == "signal":
            self._queue("told", party, k, source, self.compute[party])
        elif what == "told":
            self.writes[party] += 1
            name = f"signal {source} {k}"
            seat.told(source, k, self.mail[name])
            self.left[name] -= 1
            if self.left[name] == 0:
                del self.left[name], self.mail[name]
                self._at(self.latency, "acked", source)
        elif what == "acked":
            seat.acked(self)
        elif what == "read all":
            self.mail[f"sum {k}"] = self._read(party, PASS + k, None)
            self._at(self.latency * self._hops, "summed", party, k)
        elif what == "summed":
            seat.summed(self, k, self.mail.pop(f"sum {k}"))
        elif what == "reference":
            self._queue("refreshed", party, k, 0, self.full_pass * self.plan.epoch * self.compute[party] if k >= 0 else 0.0)
        elif what == "refreshed":
            seat.refreshed(self, self.mail[f"totals {k}" if seat.holds_labels else f"reference {k}"])
            self.left[f"reference {k}"] -= 1
            self._forget_reference(k)
        else:
            seat.met(self, what.removeprefix("met "))
        return True

    def _at(self, after: float, what: str, party: int, k: int = 0, source: int = 0) -> None:
        self.order += 1
        heapq.heappush(self.heap, (self.now + after, self.order, what, party, k, source))

    def _queue(self, what: str, party: int, k: int, source: int, cost: float) -> None:
        """Work at a party is done one piece after another; a rolling snapshot is computed beside it."""
        if what == "refreshed" and self.plan.passes == "rolling" and k >= 0:
            self._at(cost, what, party, k, source)
            return
        self.busy[party] = max(self.busy[party], self.now) + cost
        self._at(self.busy[party] - self.now, what, party, k, source)

    def _forget_reference(self, number: int) -> None:
        if self.left[f"reference {number}"] <= 0:
            for name in (f"totals {number}", f"reference {number}"):
                self.mail.pop(name, None)
            del self.left[f"reference {number}"]

    def _read(self, requester: int, request: int, rows: NDArray[np.int64] | None) -> Array:
        """The total of all parties' contributions as they are now."""
        sent, shape = [], (0,)
        for seat in self.seats:
            if seat.hosted:
                value = seat.method.contribution(rows)
                shape = value.shape
                sent.append(self.safe.send(seat.party, value, requester, request))
        return self.safe.combine(self.gather(sent), shape)

    # what it cost, and how to go on later -----------------------------------------------------------------------------------

    def messages(self, kind: str, party: int) -> list[Message]:
        """The messages of one ask, tell, pass or start."""
        if (kind, party) not in self._messages:
            plan = self.plan
            make = {
                "ask": lambda: plan.ask_messages(self.safe, party),
                "tell": lambda: plan.tell_messages(party),
                "pass": lambda: plan.pass_messages(self.safe),
            }
            self._messages[kind, party] = make[kind]() if kind in make else plan.reference_messages(False)
        return self._messages[kind, party]

    def count(self, meter: Any) -> None:
        """Give the meter what was sent since the last time."""
        for (kind, party), times in sorted((self.sent - self._flushed).items()):
            for m in self.messages(kind, party):
                meter.add(m.part, m.bits * times, m.bits * times)
        self._flushed = Counter(self.sent)

    def ledger(self) -> Ledger:
        """All that was sent so far."""
        ledger = Ledger()
        for (kind, party), times in sorted(self.sent.items()):
            ledger.add(self.messages(kind, party), times)
        return ledger

    PLAIN = ("now", "order", "claimed", "steps", "staleness")

    def state(self) -> dict[str, Any]:
        """Plain containers and arrays; the same on every process."""
        return {
            **{name: getattr(self, name) for name in self.PLAIN},
            "heap": [list(event) for event in self.heap],
            "busy": list(self.busy),
            "writes": list(self.writes),
            "mail": dict(self.mail),
            "left": dict(self.left),
            "read_at": {k: list(v) for k, v in self.read_at.items()},
            "sent": [[kind, party, n] for (kind, party), n in self.sent.items()],
            "seats": [{**s.counters(), "signals": {str(k): v for k, v in s.signals.items()}} for s in self.seats],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.heap = [(e[0], e[1], e[2], e[3], e[4], e[5]) for e in state["heap"]]
        self.busy, self.writes = list(state["busy"]), list(state["writes"])
        self.mail, self.left = dict(state["mail"]), Counter(state["left"])
        self.read_at = {k: (v[0], v[1]) for k, v in state["read_at"].items()}
        self.sent = Counter({(kind, party): n for kind, party, n in state["sent"]})
        self._flushed = Counter(self.sent)
        for seat, saved in zip(self.seats, state["seats"], strict=True):
            seat.load_counters(saved)
            seat.signals = {int(k): v for k, v in saved["signals"].items()}
