"""Who is there while a real party runs: greetings, absence, patience, requests to stop. The other half of vertical_party.py."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.errors import Diverged, Failed, Issue, Stopped
from xutrain.methods.vertical.plan import Plan
from xutrain.methods.vertical.seat import Seat
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.party import PartyPort
from xutrain.methods.vertical.transports.wire import Envelope

TICK_S, PING_S = 0.2, 1.0


class Presence:
    """Every wait for somebody else, with its end. The attributes are Process's."""

    recipe: Any
    party: str
    plan: Plan
    seat: Seat
    port: PartyPort
    link: Link
    out: Path
    say: Callable[[str], None]
    moved: float
    pinged: float
    lost_since: dict[str, float]
    signalled: bool

    @property
    def steps(self) -> int:
        """Writes to this party's block: own steps and applied signals."""
        return self.seat.taken + self.port.applied

    @property
    def _over(self) -> bool:
        """Whether every label holder has said that it needs nothing more."""
        return {self.plan.names[p] for p in self.plan.active} <= self.port.finished

    def _happen(self, what: str, k: int, value: Any) -> None:
        """Act on one event of the port."""
        raise NotImplementedError

    def _save(self, done: bool = False) -> None:
        """Write a checkpoint."""
        raise NotImplementedError

    def _leave(self, scores: dict[str, float]) -> None:
        """Write the model and the ledger of this party."""
        raise NotImplementedError

    def _greet_all(self) -> None:
        """Wait until every party has met every other, or until the label holders say that all is done: parties may have left by then."""
        until = time.monotonic() + self.recipe.network.patience_s
        for p in self.port.peers:
            self.port.greet(p)
        missing = set(self.port.peers)
        reasons: dict[str, str] = {}
        while missing and not self._over:
            if self.signalled:
                raise self._stop("asked to stop")
            if time.monotonic() > until:
                listed = "; ".join(f"{p} ({self.recipe.network.addresses[p]}): {reasons.get(p, 'no answer')}" for p in sorted(missing))
                what = f"not there within {self.recipe.network.patience_s:g} s: {listed}"
                raise Failed(Issue("network", what, has_value=False, hint="xutrain vertical doctor"))
            try:
                what, k, value = self.port.events.get(timeout=TICK_S)
            except queue.Empty:
                continue
            if what != "greeted":
                self._happen(what, k, value)
                continue
            p, reply, reason = value
            if reply is None:
                reasons[p] = reason
                if "another recipe" in reason or "another run" in reason:
                    raise Failed(Issue("network", f"{p} {reason}", has_value=False, hint="all parties must use the same job file"))
                if "align first" in reason or "one training" in reason:
                    raise Failed(Issue("network", f"{p} {reason}", has_value=False))
                time.sleep(TICK_S)
                self.port.greet(p)
            else:
                self.port.meet_peer(p, reply)
                if reply.facts.get("known") == len(self.port.peers):
                    missing.discard(p)
                else:  # it has not met everybody yet, and would refuse requests that name all sessions
                    reasons[p] = "there, but not all others have reached it"
                    time.sleep(TICK_S / 8)
                    self.port.greet(p)

    def _greeted(self, p: str, reply: Any, reason: str) -> None:
        if reply is None:
            self.port.away(p, reason)
            return
        self.port.meet_peer(p, reply)
        if self.port.peers[p].lost:
            self.say(f"{self.party}: {p} is back")
            if self.seat.holds_labels and self.port.peers[p].needs_reference:
                self._remind()
            self.port.back(p)
        self.lost_since.pop(p, None)

    def _remind(self) -> None:
        """Give collaborators that lost their memory a reference to start from: each estimate is unbiased with any."""
        plan, method = self.plan, self.seat.method
        if plan.backward and plan.table and self.seat.party == plan.leader:
            zeros = np.zeros((plan.n, plan.classes) if plan.classes else plan.n)
            known = method.state().get("reference")
            self.port.refer(-1, zeros, known if known is not None else self.seat.reference_signal(zeros))

    def _watch(self) -> None:
        """Greet the lost, ping the silent, stop when patience is over or somebody asked for it."""
        now = time.monotonic()
        if now - self.pinged < PING_S:
            return
        self.pinged = now
        patience = self.recipe.network.patience_s
        for p, peer in self.port.peers.items():
            if p in self.port.finished and not peer.lost:
                continue
            if peer.lost and p not in self.lost_since:
                self.lost_since[p] = now
                self.say(
                    f"{self.party}: {p} does not answer ({peer.lost}); "
                    + ("going on without its share" if self.port.go_on else f"waiting up to {patience:g} s")
                )
            if peer.lost or now - peer.heard > 2 * PING_S:
                self.port.greet(p)
            enough = (
                self.port.suffice(sum(not other.lost for other in self.port.peers.values()))
                and self.plan.names.index(p) not in self.plan.active
            )
            if p in self.lost_since and now - self.lost_since[p] > patience and not enough:
                raise self._stop(f"{p} was away for more than {patience:g} s ({peer.lost})")
        limit = patience + 2 * self.recipe.network.timeout_s
        if self.seat.holds_labels and not self.port.complete and now - self.moved > limit:
            raise self._stop(f"nothing happened for {limit:g} s, though nobody is missing")
        if self.port.fault is not None:
            raise self.port.fault
        if self.port.stopped:
            raise self._stop(self.port.stopped, tell=False)
        if self.signalled or (self.out / "STOP").exists():
            raise self._stop("asked to stop")
        if not np.isfinite(self.seat.method.weights).all():
            raise Diverged(Issue(self.party, "the weights are not finite", hint="lower train.lr", has_value=False))

    def _stop(self, reason: str, tell: bool = True) -> Stopped:
        if tell:
            self._tell_stop(reason)
        self._save()
        self._leave({})
        return Stopped(
            Issue(
                self.party,
                f"stopped after {self.steps} steps: {reason}",
                hint="the same command goes on from the checkpoint",
                has_value=False,
            )
        )

    def _tell_stop(self, reason: str) -> None:
        for p, peer in self.port.peers.items():
            if not peer.lost:
                try:
                    self.link.ask(p, Envelope("stop", facts={"reason": reason}), timeout_s=1.0)
                except ConnectionError:
                    continue

    def _tell_done(self, p: str) -> None:
        """Say that nothing more is needed of ``p``; one that is away is waited for, since it leaves its model only when it is told."""
        until = time.monotonic() + (3 * TICK_S if self.port.go_on else self.recipe.network.patience_s)
        while not self.signalled:
            try:
                self.link.ask(p, Envelope("done"))
                return
            except ConnectionError as reason:
                if time.monotonic() > until:
                    self.say(f"{self.party}: {p} could not be told that the run is over ({reason})")
                    return
                time.sleep(TICK_S)

    def _hear(self, number: int, frame: Any) -> None:
        self.signalled = True

    def _refused(self, sender: str, reason: str) -> None:
        line = {"time": time.time(), "from": sender, "reason": reason}
        with (self.out / "refused.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.say(f"{self.party}: refused a message from {sender}: {reason}")
