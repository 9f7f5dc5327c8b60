"""One real party's process: the same seat as in the simulation, over gRPC. ``xutrain vertical train --party NAME``. No torch here.

Every wait has an end: a request has a deadline, an absent party is named and waited for up to ``network.patience_s``, and then the run
stops with a checkpoint from which the same command goes on.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data.party_file import PartyData
from xutrain.data.tabular import PartyBlock, VerticalData
from xutrain.errors import Diverged, Failed, Issue, RecipeError
from xutrain.loops.vertical_job import job_hash, network_issues
from xutrain.loops.vertical_presence import TICK_S, Presence
from xutrain.methods.vertical.measure import References, quality
from xutrain.methods.vertical.plan import Plan, longest_step, methods_of
from xutrain.methods.vertical.seat import Seat
from xutrain.methods.vertical.security import SafeSum, trees
from xutrain.methods.vertical.transports.identity import Identity
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.party import PartyPort
from xutrain.methods.vertical.transports.wire import Refused

Say = Callable[[str], None]


class Process(Presence):
    """One party's run: greet, train, evaluate, save; see ``run_party``."""

    def __init__(self, recipe: Any, party: str, data: PartyData, identity: Identity, out: Path, say: Say, purpose: str = "train") -> None:
        if found := network_issues(recipe):
            raise RecipeError(*found)
        self.recipe, self.party, self.data, self.out, self.say = recipe, party, data, out, say
        names = recipe.party_names
        index = names.index(party)
        empty = np.zeros(0)
        blocks = [data.block if n == party else PartyBlock(n, [], data.block.train[:, :0], data.block.test[:, :0]) for n in names]
        self.task = {"logistic": "binary", "ridge": "regression", "softmax": "classes"}[recipe.loss]
        classes = (recipe.data.classes or 0) if self.task == "classes" else 0
        n = data.block.train.shape[0]
        y = data.y if data.y is not None else np.zeros(n if purpose == "train" else recipe.train.batch_size)
        shared = VerticalData("party", blocks, y, empty, self.task, classes=classes)
        self.plan = plan = Plan.of(recipe, shared)
        method = methods_of(recipe, shared, plan, [index], [recipe.train.lr] * len(names))[index]
        if index in plan.active and data.y is None and purpose == "train":
            raise RecipeError(Issue("labels", f"{party} is to hold labels, but its file has no label column", recipe.labels))
        self.seat = Seat(index, plan, method, data.y if index in plan.active else None)
        slow = 1.0 + recipe.time.delay * (recipe.time.slow_party == party)
        facts = {"rows": len(data.ids), "order": data.order_hash(recipe.network.run), "columns": data.block.train.shape[1]}
        step_s = recipe.network.step_ms / 1000.0 * slow
        security = recipe.security
        self.port = PartyPort(
            plan, self.seat, data.block.test, security.mode, facts, step_s=step_s, go_on=recipe.network.lost == "go_on",
            pair=trees.pair(security.trees, plan.q, security.t1, security.t2) if security.mode == "tree" else None,
            longest=longest_step(data.block.train, recipe) if recipe.train.rates == "compensated" and n else 0.0,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        network = recipe.network
        self.port.link = self.link = Link(
            identity, {n: network.addresses[n] for n in names}, network.run, f"{purpose} {job_hash(recipe)}", self.port.handle,
            refused=self._refused, max_bytes=network.max_message_mb << 20, timeout_s=network.timeout_s,
            nested=2 * len(plan.active) * (recipe.train.in_flight + 2) if security.mode == "tree" else 0,
        )  # fmt: skip
        self.started = self.moved = time.monotonic()
        self.lost_since: dict[str, float] = {}
        self.pinged = self.saved_at = 0.0
        self.scores: dict[str, float] = {}
        self.signalled = False
        self.arrived: set[str] = set()

    def run(self) -> dict[str, float]:
        """The whole run of this party; returns the final metrics (label holders) or {}."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)
            signal.signal(signal.SIGINT, self._hear)
        resumed = self._restore()
        self.link.start()
        try:
            self._greet_all()
            self.say(f"{self.party}: all parties are there" + (f"; goes on from step {self.steps}" if resumed else ""))
            for text in self._statement():
                self.say(f"{self.party}: {text}")
            if self.seat.holds_labels:
                self._begin(resumed)
                self._events(lambda: self.port.complete and not self.port.tells and not self.port.unsent)
                if self.seat.party == self.plan.leader:  # the result is that of all blocks, when all have been written for the last time
                    others = {self.plan.names[p] for p in self.plan.active} - {self.party}
                    self._events(lambda: others <= self.port.finished)
                    self._evaluate(final=True)
                    self.scores |= self._alone()
                for p in self.port.peers:
                    self._tell_done(p)
            self.port.finished.add(self.party)
            self._events(lambda: self._over)
            self._save(done=True)
        except Refused as reason:
            raise Failed(Issue(self.party, str(reason), has_value=False)) from None
        except Diverged as error:
            self._tell_stop(error.issues[0].what)
            raise
        finally:
            self.link.close()
        self._leave(self.scores)
        return self.scores

    @property
    def left(self) -> str:
        """What left this party, by its ledger."""
        return self.port.ledger.summary(self.seat.party, self.plan.names)

    def _statement(self) -> list[str]:
        """Who can learn what in this run, of which every party is told."""
        known = {p: peer.facts.get("columns") for p, peer in self.port.peers.items()} | {self.party: self.port.facts["columns"]}
        widths = [n if isinstance(n := known[p], int) else 0 for p in self.plan.names]
        security = self.recipe.security
        safe = SafeSum(security.mode, self.plan.q, 0, security.trees, security.t1, security.t2)
        return safe.statement(self.plan, self.recipe.loss, widths) + self.plan.idle

    def _alone(self) -> dict[str, float]:
        """Objective and AUC that this label holder reaches with its own columns alone: what the others are worth to it."""
        y, y_test, looks = self.data.y, self.data.y_test, self.recipe.eval.model_copy(update={"reference": False})
        assert y is not None and y_test is not None
        own = VerticalData("own", [self.data.block], y, y_test, self.task)
        return References(self.recipe.model_copy(update={"eval": looks}), own).alone

    def _begin(self, resumed: bool) -> None:
        if not resumed:
            self.seat.begin(self.port)
            return
        if any(peer.needs_reference for peer in self.port.peers.values()):
            self._remind()
        self.seat.pass_or_go_on(self.port)  # the checkpoint may lie just before a full pass

    def _events(self, over: Callable[[], bool]) -> None:
        """Do what happens until it is over. Never waits longer than a tick for anything."""
        every = self.recipe.eval.every_epochs and max(1, round(self.recipe.eval.every_epochs * self.plan.epoch))
        save_every = self.recipe.checkpoint.every or self.plan.epoch
        while not over():
            try:
                what, k, value = self.port.events.get(timeout=TICK_S)
            except queue.Empty:
                what, k, value = "tick", 0, None
            if what not in ("tick", "greeted"):
                self.moved = time.monotonic()
            before = self.seat.taken
            self._happen(what, k, value)
            if self.seat.taken > before and every and self.seat.taken % every == 0 and not self.port.complete:
                self._evaluate(final=False)
            done = self.seat.taken + self.port.applied
            if done >= self.saved_at + save_every:
                self._save()
            self._watch()

    def _happen(self, what: str, k: int, value: Any) -> None:
        seat, port = self.seat, self.port
        if what == "reply":
            port.replied(k, *value)
        elif what == "sent":
            port.delivered(k, *value)
        elif what == "greeted":
            self._greeted(*value)
        elif what == "answered":
            seat.answered(port, k, value)  # reads no weights: the others' requests are answered while this step is computed
        elif what == "worked" and self.plan.mode == "sync" and not port.all_read(k):
            time.sleep(0.001)  # lock step: nobody writes before everybody has read
            port.events.put((what, k, value))
        elif what == "worked":
            with port.block:
                seat.worked(port, k)
        elif what == "acked":
            seat.acked(port)
        elif what == "met":
            seat.met(port, value)
        elif what == "turn":
            port.reached(value[0], value[1], k)
        elif what == "summed":
            seat.summed(port, k, value)
        elif what == "refreshed":
            with port.block:
                seat.refreshed(port, value)
        elif what == "evaluated":
            self._evaluated(*value)

    # what is measured and kept ----------------------------------------------------------------------------------------------

    def _evaluate(self, final: bool) -> None:
        if self.seat.party != self.plan.leader:
            return
        self.port.evaluate("train")
        if final:
            if len(self.data.y_test if self.data.y_test is not None else ()):
                self.port.evaluate("test")
            wanted = {"train", "test"} if self.data.y_test is not None and len(self.data.y_test) else {"train"}
            self.arrived = set()
            self._events(lambda: wanted <= self.arrived)

    def _evaluated(self, split: str, summed: np.ndarray) -> None:
        assert self.data.y is not None and self.data.y_test is not None
        y = self.data.y if split == "train" else self.data.y_test
        totals, norm = self._totals(summed), float(summed[-1])
        loss = self.seat.method.objective(totals, y)
        found = {f"{split}_{k}": v for k, v in quality(self.task, totals, y).items()}
        if split == "train":
            found["objective"] = loss + 0.5 * self.recipe.train.weight_decay * norm
        else:
            found["test_loss"] = loss
        self.scores.update(found)
        self.arrived.add(split)
        line = {"step": self.seat.taken, "seconds": round(time.monotonic() - self.started, 3), **found}
        with (self.out / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.say(f"{self.party}: step {self.seat.taken}/{self.plan.steps}  " + "  ".join(f"{k} {v:.6g}" for k, v in found.items()))

    def _totals(self, summed: np.ndarray) -> np.ndarray:
        """The joint scores of an evaluation, (rows,) or (rows, classes); the last number is the squared norm of all weights."""
        return summed[:-1].reshape(-1, self.plan.classes) if self.plan.classes else summed[:-1]

    def _save(self, done: bool = False) -> None:
        """State of this party, whole or absent."""
        with self.port.block:
            arrays = {f"method.{k}": v for k, v in self.seat.method.state().items()}
            counters = {**self.seat.counters(), "applied": self.port.applied, "done": int(done)}
        everything: Any = {"job": np.array(job_hash(self.recipe)), **arrays, **{f"count.{k}": np.array(v) for k, v in counters.items()}}
        self.saved_at = self.seat.taken + self.port.applied
        aside = self.out / ".state.npz.aside"
        with aside.open("wb") as file:
            np.savez(file, **everything)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.out / "state.npz")

    def _restore(self) -> bool:
        path = self.out / "state.npz"
        if not path.is_file():
            return False
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["job"]) != job_hash(self.recipe):
                raise RecipeError(Issue("--out", "holds the checkpoint of another job", str(self.out), "choose another folder"))
            self.seat.method.load_state({k.removeprefix("method."): saved[k] for k in saved.files if k.startswith("method.")})
            counters = {k.removeprefix("count."): int(saved[k]) for k in saved.files if k.startswith("count.")}
        self.port.applied = counters["applied"]
        self.seat.load_counters({**counters, "asked": counters["taken"], "unacked": 0, "rounds": counters["taken"]})
        return True

    def _leave(self, scores: dict[str, float]) -> None:
        """The model and the ledger of this party."""
        block, method = self.data.block, self.seat.method
        model = {
            "party": self.party,
            "parties": self.plan.names,
            "run": self.recipe.network.run,
            "job": job_hash(self.recipe),
            "rows": self.port.facts["order"],
            "columns": block.columns,
            "weights": method.weights.tolist(),
            "loss": self.recipe.loss,
            "method": self.recipe.method.name,
            "weight_decay": self.recipe.train.weight_decay,
            "steps": self.seat.taken,
            "preprocessing": block.preprocessing,
            "metrics": scores,
        }
        (self.out / f"model.{self.party}.json").write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
        self.port.ledger.write(self.out / f"ledger.{self.party}.jsonl", self.plan.names.index(self.party), self.plan.names)
