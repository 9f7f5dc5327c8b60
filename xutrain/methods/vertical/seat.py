"""The program of one party: what it does when something happens, the same over virtual time and over real wires.

A seat decides; the port (a transport) carries. What a seat asks of the port ends in a later call of a seat:
``ask`` -> ``answered``; ``work`` -> ``worked``; ``tell`` -> ``told`` at the others, then ``acked`` here; ``meet`` -> ``met``;
``sum_all`` -> ``summed`` at the leader; ``refer`` -> ``refreshed`` at those that need the new reference.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xutrain.methods.vertical.base import VerticalMethod
from xutrain.methods.vertical.losses import Array
from xutrain.methods.vertical.plan import Plan


class Port(Protocol):
    """What carries a seat's wishes."""

    def claim(self, party: int) -> bool:
        """Whether the budget allows one more step; takes it if so."""

    def ask(self, party: int, k: int) -> None:
        """Request the sum for step k."""

    def work(self, party: int, k: int) -> None:
        """Spend the time of one step's computation."""

    def tell(self, party: int, k: int, signal: Array) -> None:
        """Send indices and signal of step k to everybody else."""

    def meet(self, party: int, what: str) -> None:
        """Say that this label holder has come to the end of a round ("step") or of a snapshot's inner loop ("pass")."""

    def wrote(self, party: int) -> None:
        """Say that a step's block is written (rolling snapshots and the run's counter follow it)."""

    def sum_all(self, number: int) -> None:
        """Request the sums over all n samples for snapshot ``number``, at the leader."""

    def refer(self, number: int, totals: Array, signal: Array) -> None:
        """Send reference totals to the label holders and, with backward updating, signals to the others. ``number`` -1 is the start."""


class Seat:
    """One party's state of play.

    Args:
        hosted: whether this process computes the party; if not, only its control flow is followed.
        y: the labels, for label holders.
    """

    def __init__(self, party: int, plan: Plan, method: VerticalMethod, y: NDArray | None, hosted: bool = True) -> None:
        self.party, self.plan, self.method, self.y, self.hosted = party, plan, method, y, hosted
        self.holds_labels = party in plan.active
        self.asked = self.taken = self.unacked = self.referred = self.rounds = 0
        self.signals: dict[int, Array] = {}

    def begin(self, port: Port) -> None:
        """Start from the reference point w = 0, whose totals are known to be zero, and ask for the first sums."""
        if self.plan.table and self.holds_labels:
            zeros = np.zeros((self.plan.n, self.plan.classes) if self.plan.classes else self.plan.n)
            signal = self.reference_signal(zeros)
            if self.hosted:
                self.method.refer(signal)
            if self.plan.backward and self.party == self.plan.leader:
                port.refer(-1, zeros, signal)
        self.go_on(port)

    def reference_signal(self, totals: Array) -> Array:
        """Signal of all samples at reference totals."""
        assert self.y is not None
        return self.method.signal(totals, self.y)

    def may_ask(self) -> bool:
        """Whether nothing keeps this party from its next request."""
        plan = self.plan
        if not self.holds_labels or self.asked - self.taken >= plan.in_flight or self.unacked > plan.backlog:
            return False
        if plan.budget == "local" and self.asked >= plan.steps:
            return False
        if plan.passes == "barrier" and self.asked >= (self.referred + 1) * plan.inner:
            return False
        return plan.mode == "async" or self.asked == self.rounds

    def go_on(self, port: Port) -> None:
        """Ask for as much as is allowed now."""
        while self.may_ask() and port.claim(self.party):
            self.asked += 1
            port.ask(self.party, self.asked - 1)

    def answered(self, port: Port, k: int, totals: Array) -> None:
        """The totals of step k are here: derive the signal, pass it on, compute the step."""
        assert self.y is not None
        signal = self.method.signal(totals, self.y[self.plan.rows(self.party, k)])
        self.signals[k] = signal
        if self.plan.backward:
            self.unacked += 1
            port.tell(self.party, k, signal)
        port.work(self.party, k)

    def worked(self, port: Port, k: int) -> None:
        """The computation of step k is done: write the block."""
        signal = self.signals.pop(k)
        if self.hosted:
            self.method.apply(self.plan.rows(self.party, k), signal)
        self.taken += 1
        port.wrote(self.party)
        if self.plan.mode == "sync":
            self.end_round(port)
        else:
            self.pass_or_go_on(port)

    def end_round(self, port: Port) -> None:
        """Lock step: a round ends when the block is written and every signal is applied."""
        if self.taken > self.rounds and self.unacked == 0:
            port.meet(self.party, "step")

    def pass_or_go_on(self, port: Port) -> None:
        """At the end of an inner loop wait for the others and the full pass; else ask on."""
        plan = self.plan
        if plan.passes == "barrier" and self.taken == (self.referred + 1) * plan.inner and self.taken < plan.steps:
            if self.unacked == 0:
                port.meet(self.party, "pass")
        else:
            self.go_on(port)

    def acked(self, port: Port) -> None:
        """All others have applied one of this party's signals."""
        self.unacked -= 1
        if self.plan.mode == "sync":
            self.end_round(port)
        else:
            self.pass_or_go_on(port)

    def met(self, port: Port, what: str) -> None:
        """All label holders are at the same place."""
        if what == "step":
            self.rounds += 1
            self.pass_or_go_on(port)
        elif self.party == self.plan.leader:
            port.sum_all(self.referred)

    def summed(self, port: Port, number: int, totals: Array) -> None:
        """The leader has the reference totals of a snapshot: share them."""
        port.refer(number, totals, self.reference_signal(totals) if self.plan.backward else totals)

    def told(self, source: int, k: int, signal: Array) -> None:
        """Backward updating: apply another party's signal to this party's block."""
        if self.hosted:
            self.method.apply(self.plan.rows(source, k), signal)

    def refreshed(self, port: Port, reference: Array) -> None:
        """Change over to a new reference, given as totals (label holders) or signals (collaborators)."""
        if self.hosted:
            self.method.refer(self.reference_signal(reference) if self.holds_labels else reference)
        if self.holds_labels:
            self.referred += 1
            if self.plan.passes == "barrier":
                self.go_on(port)

    COUNTERS = ("asked", "taken", "unacked", "referred", "rounds")

    def counters(self) -> dict[str, int]:
        """The part of the state that is the same on every process."""
        return {name: getattr(self, name) for name in self.COUNTERS}

    def load_counters(self, state: dict[str, int]) -> None:
        for name in self.COUNTERS:
            setattr(self, name, int(state[name]))
