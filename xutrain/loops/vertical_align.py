"""``xutrain vertical align``: the parties find their common ids over the network and agree on an order. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.errors import DataError, Failed, Issue
from xutrain.loops.vertical_job import job_hash
from xutrain.loops.vertical_party import Say
from xutrain.loops.vertical_presence import PING_S
from xutrain.methods.vertical.psi import Blinder, split, to_point
from xutrain.methods.vertical.transports.identity import Identity
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.wire import Envelope, Refused

CHUNK = 4096  #: ids in one message: a quarter of a second of work, and far below the limits of size and time of a message


class Alignment:
    """One party's part in one alignment; every party does the same."""

    def __init__(self, recipe: Any, party: str, ids: list[str], identity: Identity, say: Say) -> None:
        self.recipe, self.party, self.ids, self.say = recipe, party, ids, say
        self.names: list[str] = recipe.party_names
        self.blinder = Blinder()
        self.others = [p for p in self.names if p != party]
        self.coming: dict[str, list[bytes]] = {p: [] for p in self.others}
        self.finished: dict[str, list[bytes]] = {}
        self.thanked: set[str] = set()
        network = recipe.network
        job = f"align {job_hash(recipe)}"
        self.link = Link(
            identity,
            {n: network.addresses[n] for n in self.names},
            network.run,
            job,
            self.handle,
            refused=lambda sender, reason: say(f"{party}: refused a message from {sender}: {reason}"),
            max_bytes=network.max_message_mb << 20,
            timeout_s=max(network.timeout_s, 60.0),
        )

    def handle(self, e: Envelope) -> Envelope:
        """Part of a list on its way round ("blind": one more exponent, number counts them), or of a finished list ("blinded")."""
        if e.kind == "ping":
            return Envelope("ping")
        if e.kind == "done":
            self.thanked.add(e.sender)
            return Envelope("ping")
        points = self._points(e)
        if e.kind == "blind":
            if e.number >= len(self.names):
                raise Refused("a list that went round more than once")
            try:
                return Envelope("blind", number=e.number + 1, values=_packed(self.blinder.blind(points)))
            except ValueError as reason:
                raise Refused(f"no point of the curve: {reason}") from None
        if e.kind == "blinded":
            self.coming[e.sender] += points
            if len(self.coming[e.sender]) == e.facts.get("of"):
                self.finished[e.sender] = self.coming[e.sender]
            return Envelope("ping")
        raise Refused(f"{e.kind} has no place in an alignment")

    def _points(self, e: Envelope) -> list[bytes]:
        if e.values is None or e.values.dtype != np.uint64:
            raise Refused("no list of points")
        try:
            return split(e.values.astype("<u8").tobytes())
        except ValueError as reason:
            raise Refused(str(reason)) from None

    def run(self) -> tuple[list[str], dict[str, int]]:
        """Common ids in the agreed order, and sizes. Raises DataError where nothing is common, Failed where a party is away."""
        self.link.start()
        try:
            self._wait_for(self.others)
            mine = self.blinder.blind([to_point(i, self.recipe.network.run) for i in self.ids])
            for hop, p in enumerate(self.others):  # every other party raises the list once; it never sees the ids or another list's order
                replies = [self._ask(p, Envelope("blind", number=hop + 1, values=_packed(part))) for part in _parts(mine)]
                mine = [point for reply in replies for point in self._points(reply)]
                if len(mine) != len(self.ids):
                    raise Failed(Issue(p, "returned another number of ids than it was sent", len(mine)))
            for p in self.others:
                for part in _parts(sorted(mine)):
                    self._ask(p, Envelope("blinded", values=_packed(part), facts={"of": len(mine)}))
            self._until(self.finished, "finished list")
            for p in self.others:
                self._ask(p, Envelope("done"))
            self._until(self.thanked, "thanks")
        finally:
            self.link.close()
        common = set(mine).intersection(*map(set, self.finished.values()))
        if not common:
            raise DataError(
                Issue(
                    "align",
                    "the parties have no id in common",
                    {p: len(v) for p, v in self.finished.items()},
                    "are ids written alike everywhere?",
                )
            )
        order = sorted((point, i) for point, i in zip(mine, self.ids, strict=True) if point in common)
        sizes = {"rows": len(self.ids), "matched": len(order), "dropped": len(self.ids) - len(order)}
        return [i for _, i in order], {**sizes, **{f"rows of {p}": len(v) for p, v in self.finished.items()}}

    def _wait_for(self, others: list[str]) -> None:
        until = time.monotonic() + self.recipe.network.patience_s
        for p in others:
            while True:
                try:
                    self.link.ask(p, Envelope("ping"), timeout_s=2.0)
                    break
                except ConnectionError as reason:
                    if "another" in str(reason) or time.monotonic() > until:
                        raise Failed(Issue("align", f"{p}: {reason}", has_value=False, hint="xutrain vertical doctor")) from None
                    time.sleep(0.2)

    def _ask(self, p: str, e: Envelope) -> Envelope:
        try:
            return self.link.ask(p, e)
        except ConnectionError as reason:
            raise Failed(Issue("align", f"{p}: {reason}", has_value=False, hint="start align again at all parties")) from None

    def _until(self, have: Collection[str], what: str) -> None:
        """Wait for something from every other party, as long as those that still owe it are there: a long list takes its time."""
        alive = asked = time.monotonic()
        while missing := [p for p in self.others if p not in have]:
            now = time.monotonic()
            if now - asked > PING_S:
                asked = now
                try:
                    for p in missing:
                        self.link.ask(p, Envelope("ping"), timeout_s=2.0)
                    alive = time.monotonic()
                except ConnectionError as reason:
                    if now - alive > self.recipe.network.patience_s:
                        raise Failed(Issue("align", f"no {what} from {', '.join(missing)}: {reason}", has_value=False)) from None
            time.sleep(0.02)


def _parts(points: list[bytes]) -> Iterator[list[bytes]]:
    """A list in pieces of one message each; one empty piece of an empty list."""
    for at in range(0, max(1, len(points)), CHUNK):
        yield points[at : at + CHUNK]


def _packed(points: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(points), dtype="<u8").astype(np.uint64)


def write_order(path: Path, ids: list[str], report: dict[str, int]) -> None:
    """The private order file of this party."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"ids": ids, "report": report}, indent=1) + "\n", encoding="utf-8")
