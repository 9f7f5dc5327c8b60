"""Auto-FedRL: any federated method whose rounds are configured by an agent, while the one and only training run goes on.

Paper: arXiv 2203.06338 (ECCV 2022). Round q with lag 0, the clean order:

    1. the server sends w_q; client k answers its validation loss of it, one number; L_q is their mean                  (exchange 0)
    2. r_{q-1} = 1 - L_q / L_{q-1}; the agent takes a step of REINFORCE and draws h_q                    (reinforce.py, the agent)
    3. the server sends lr_q and li_q, two numbers; the clients train from the w_q that they hold and answer     (exchange 1)
    4. the wrapped method merges with the drawn aggregation weights, server learning rate and knobs

With lag 1, the public code's order, h_q is drawn before L_q is known, so model, lr and li travel at once and the loss comes with
the training answer. Both send equally many bits: one model and two numbers down, one update and one number up. Clients
never see aggregation weights, nor knobs that only the server needs.

What a round breaks is mended: where the merged model or its validation loss is not finite, the sample's reward is -1, the model
before the round comes back with everything else in the server's state, the clients are told to go back too (`base.UNDO`), and the
next round draws again (the server then sends the model once more under lag 0). An agent that
never moves and never redraws (``fixed``) leaves the wrapped method bit for bit what it is without a search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import Diverged, Issue
from xutrain.methods.federate.base import (
    SINCE,
    UNDO,
    Committee,
    FederatedMethod,
    Plan,
    Problem,
    Reply,
    Round,
    State,
    Traffic,
    clone,
    finite,
)
from xutrain.methods.federate.search import dirichlet
from xutrain.methods.federate.search.base import Agent, Noise
from xutrain.methods.federate.search.controls import RandomSearch
from xutrain.methods.federate.search.memory import inner_part, put_back, score_of, shown_of
from xutrain.methods.federate.search.reinforce import advantages, reward
from xutrain.methods.federate.search.rollouts import Judge, roll_out
from xutrain.methods.federate.search.space import Coordinate

#: options that only a server uses: not sent, unless clients infer something from them
SERVER_SIDE = frozenset({"server_lr", "server_momentum", "beta1", "beta2", "tau", "weight_lr"})
#: lost rounds in a row after which a run has diverged
PATIENCE = 10
LOSS = "val_loss"


class Searched(FederatedMethod):
    """A method under an agent.

    Args:
        inner: the wrapped method.
        search: the recipe's search section.
        agent: draws and learns; its state is ``server["search"]["agent"]``.
        counts: validation samples of every client.
        judge: loss of a flat model on the server's own validation samples, for roll-outs.
    """

    def __init__(self, inner: FederatedMethod, search: Any, agent: Agent, counts: Sequence[int], judge: Judge | None = None) -> None:
        super().__init__(inner.options, inner.federation)
        self.inner, self.search, self.agent, self.space, self.counts, self.judge = inner, search, agent, agent.space, tuple(counts), judge
        self.reports = all(self.counts)
        self._before: State = {}
        self._reported: dict[int, float] = {}
        self.ahead = 1 if search.lag == 0 and agent.learns else 0  # exchanges before the wrapped method's own
        flags = {n: getattr(inner, n) for n in ("personal", "pooled", "silent", "own_steps", "adaptive", "plain", "private_buffers")}
        for name, value in {**flags, "exchanges": inner.exchanges + self.ahead, "tolerant": agent.resamples}.items():
            setattr(self, name, value)
        self.trials = agent.options.trials if isinstance(agent, RandomSearch) else 1

    # what the agent does

    def server_state(self, model: Tensor) -> State:
        state = self.inner.server_state(model)
        weights = self.search.space.weights
        kappa = dirichlet.start(self.federation.clients, weights.concentration) if self.space.dirichlet else {}
        found: State = {
            "agent": self.agent.start(),
            "dirichlet": kappa,
            "memory": [],
            "waiting": [],
            "loss": None,
            "losses": [],
            "safe": {},
        }
        found.update(safe_from=0, undo=[], reward=None, lost=0, in_row=0, resend=False, rollout_adam={}, policy=[], shown={})
        if self.trials > 1:
            found.update(origin={}, best={}, best_loss=math.inf)
        state["search"] = found
        return state

    def trial(self, index: int) -> int:
        """The training to which a round belongs, 0 but for a random search; their lengths differ by one round at most."""
        return min(index * self.trials // max(1, self.federation.rounds), self.trials - 1)

    def since(self, index: int) -> int:
        """The round with which that training began."""
        return -(-self.trial(index) * max(1, self.federation.rounds) // self.trials)

    def draw(self, server: State, base: Round) -> None:
        """A sample for round ``base``, remembered until its reward is known."""
        held = server["search"]
        at = self.trial(base.index) if isinstance(self.agent, RandomSearch) else base.index
        pair, sign = (at - at % 2, -1 if at % 2 else 1) if self.search.antithetic else (at, 1)
        u, given = self.agent.draw(held["agent"], Noise(Key(self.federation.seed, "search", pair), sign))
        held["policy"] = list(self.agent.moments(held["agent"]))  # of the law that u came from
        sample: State = {"u": u, "given": given, "round": base.index}
        if self.space.dirichlet:
            law = held["dirichlet"]
            noise = Noise(Key(self.federation.seed, "search/weights", at))
            sample["shares"] = dirichlet.draw(law, noise) if self.agent.resamples else dirichlet.moments(law)[0]
        held["waiting"] = [*(held["waiting"] if self.reports else []), sample]
        held["shown"] = shown_of(self.space, sample, held, base)

    def sampled(self, server: State, base: Round) -> Round:
        """The round that the newest sample asks for."""
        sample = server["search"]["waiting"][-1]
        shares = sample["shares"].tolist() if "shares" in sample else ()
        return self.space.setting(sample["u"], base, shares)

    def settle(self, server: State, index: int, loss: float, losses: dict[int, float]) -> None:
        """L_index is known: the sample of the round before gets its reward, and the agent learns."""
        held = server["search"]
        held["reward"], fresh = None, False
        for sample in [s for s in held["waiting"] if s["round"] < index]:
            held["waiting"].remove(sample)
            if "reward" not in sample:
                sample["reward"] = reward(held["loss"], loss, self.search.reward, self.search.reward_clip)
                before = dict(held["losses"])
                held["in_row"] = 0
                sample["own"] = [score_of(self.search, before.get(k), losses.get(k), sample["reward"]) for k in self._everyone()]
            held["memory"] = [*held["memory"], sample][-self.search.window :]
            held["reward"], fresh = sample["reward"], True
        if fresh and self.agent.learns and len(held["memory"]) > 1:
            self.learn(held)
        held["loss"], held["losses"] = loss, [[k, losses[k]] for k in sorted(losses)]

    def learn(self, held: State) -> None:
        """One ascent step on everything remembered."""
        memory, rule = held["memory"], self.search
        options = {"newest": not rule.window_update, "oldest": rule.released_bug}
        common = advantages([m["reward"] for m in memory], rule.baseline, **options)
        columns = []
        for c in self.space.coordinates:
            column = common
            if rule.credit == "client" and c.client >= 0:
                column = advantages([m["own"][c.client] for m in memory], rule.baseline, **options)
            columns.append(torch.zeros_like(common) if rule.rollouts and self.server_side(c) else column)
        if columns:
            self.agent.improve(held["agent"], memory, torch.stack(columns, 1))
        if self.space.dirichlet:
            step = self.agent.options
            dirichlet.improve(held["dirichlet"], [m["shares"] for m in memory], common, step.lr, step.beta1, step.beta2)

    def _everyone(self) -> range:
        return range(self.federation.clients)

    # what the loop asks

    def configure(self, server: State, round: Round) -> Round:
        held = server["search"]
        if self.trials > 1 and round.index == 0:
            held["origin"] = clone(inner_part(server))
        elif self.trials > 1 and self.since(round.index) == round.index:
            put_back(server, held["origin"])
            held.update(waiting=[], loss=None, losses=[], safe={}, undo=[], in_row=0)
        base = self.inner.configure(server, round)
        if self.ahead:
            return base
        self.draw(server, base)
        return self.sampled(server, base)

    def refine(self, server: State, round: Round, exchange: int) -> Round:
        return self.sampled(server, round) if self.ahead and exchange == self.ahead else round

    def sent_knobs(self) -> list[str]:
        """Searched options that clients must know."""
        follows = getattr(self.inner, "follows", False)
        return [k for k in self.space.knobs if follows or k not in SERVER_SIDE]

    def server_side(self, c: Coordinate) -> bool:
        """A value that no client works with, so that the server may draw it again when they have answered."""
        if c.key == "weights":
            return not self._needs_mean_steps()
        return c.key not in ("lr", "local_work", *self.sent_knobs())

    def _numbers(self) -> list[str]:
        """What a training plan says beside the wrapped method's own."""
        if not self.agent.resamples:
            return []  # the middle of the ranges follows from the recipe
        space = self.search.space
        named = [n for n, item in (("lr", space.lr), ("local_work", space.local_work)) if item is not None]
        follows = bool(getattr(self.inner, "follows", False))
        own = space.lr is not None and space.lr.per_client and follows and not self.federation.partial
        return [*named, *self.sent_knobs(), *(["round_lr"] if own else []), *(["mean_steps"] if self._needs_mean_steps() else [])]

    def _needs_mean_steps(self) -> bool:
        """Clients that infer the server's momentum divide by sum p_k P_k, which drawn weights change where the P_k differ."""
        work = self.search.space.local_work
        differ = work is not None and (work.unit == "epochs" or work.per_client)
        return bool(getattr(self.inner, "follows", False) and self.space.form and differ)

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        mine = exchange < self.ahead
        plan = self.inner.plan(server, round, client, 0 if mine else exchange - self.ahead)
        plan.exchange = exchange
        if not mine:
            plan.knobs = {k: v for k, v in plan.knobs.items() if k not in self.space.knobs or k in self.sent_knobs()}
        if exchange == self.ahead:
            if self.ahead and not server["search"]["resend"]:
                plan.tensors, plan.numbers = {}, {}  # the client has them
            values = {"lr": plan.lr, "round_lr": plan.common_lr, "local_work": float(plan.steps), "mean_steps": plan.mean_steps}
            plan.numbers.update({name: {**values, **plan.knobs}[name] for name in self._numbers()})
        undo = dict(server["search"]["undo"]).get(client)
        if undo is not None:
            plan.numbers[UNDO] = float(undo)
        if self.trials > 1:
            plan.knobs[SINCE] = float(self.since(round.index))
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        numbers: dict[str, float] = {}
        if self.reports and plan.exchange == 0:
            numbers[LOSS] = problem.evaluate(self.inner.received(state, plan))["loss"]
        if plan.exchange < self.ahead:
            state["received"] = {"tensors": plan.tensors, "numbers": plan.numbers}
            return Reply(numbers=numbers)
        received = state.pop("received", {})
        if plan.exchange == self.ahead:
            plan.numbers = {k: v for k, v in plan.numbers.items() if k not in self._numbers()}
            if self.ahead and not plan.tensors:
                plan.tensors, plan.numbers = received["tensors"], received["numbers"]
        reply = self.inner.step(state, replace(plan, exchange=plan.exchange - self.ahead), problem)
        reply.numbers.update(numbers)
        return reply

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        losses: dict[int, float] = {}
        stream = self._losses_of(replies, losses)
        held = server["search"]
        if exchange < self.ahead:
            for _ in stream:
                pass
            self._told(held, round)
            loss = self._mean_loss(losses)
            held["resend"] = not math.isfinite(loss)
            if held["resend"]:
                self._lost(server, round, held["safe"], held["safe_from"], loss)
                loss, losses = held["loss"], dict(held["losses"])
            self.settle(server, round.index, loss, losses)
            self.draw(server, round)
            return
        inside = exchange - self.ahead
        if inside == 0 and self.tolerant:
            self._before = clone(inner_part(server))
        if self.search.rollouts and self.judge is not None:
            roll_out(self, server, round, list(stream), self._before)
        else:
            self.inner.merge(server, round, stream, inside)
        self._told(held, round)
        if losses:
            self._reported = losses
        if inside < self.inner.exchanges - 1:
            return
        if self.reports and not self.ahead:
            loss = self._mean_loss(self._reported)
            if self.tolerant and not math.isfinite(loss):
                held["waiting"] = held["waiting"][:-1]  # trained from a model that was no good: says nothing of this sample
                self._lost(server, round, held["safe"], held["safe_from"], loss)
                self.settle(server, round.index, held["loss"], dict(held["losses"]))
                return
            self.settle(server, round.index, loss, self._reported)
        if self.tolerant:
            self._guard(server, round)
        if self.trials > 1:
            self._close_trial(server, round.index)

    def _guard(self, server: State, round: Round) -> None:
        """Keep the model before this round, or take it back where the new one is not finite."""
        held = server["search"]
        if finite(inner_part(server)):
            held.update(safe=self._before, safe_from=round.index)
        else:
            self._lost(server, round, self._before, round.index, math.nan)

    def _lost(self, server: State, round: Round, safe: State, start: int, loss: float) -> None:
        """Reward -1 for the newest sample, and back to the state ``safe`` from before round ``start``, at the clients too."""
        held = server["search"]
        bad_training_loses = self.trials > 1 and held["lost"] + 1 < self.federation.rounds
        if not safe or (held["in_row"] >= PATIENCE and not bad_training_loses):
            rounds = f"{held['in_row'] + 1} rounds in a row were not finite" if self.trials == 1 else "no round of any training was finite"
            what = rounds if safe else "the validation loss of the initial model is not finite"
            hint = "narrow search.space (lower learning rates), or set train.clip_norm"
            raise Diverged(Issue(f"round {round.index}", what, loss, hint))
        if held["waiting"]:
            held["waiting"][-1].update(reward=-1.0, own=[-1.0] * self.federation.clients)
        put_back(server, safe)
        waiting = dict(held["undo"])
        held["undo"] = [[k, min(start, waiting.get(k, start))] for k in self._everyone()]
        held.update(lost=held["lost"] + 1, in_row=held["in_row"] + 1)

    def _told(self, held: State, round: Round) -> None:
        """Who takes part has read its plan."""
        held["undo"] = [[k, start] for k, start in held["undo"] if k not in round.clients]

    def lost(self, server: State) -> int:
        return int(server["search"]["lost"])

    def _close_trial(self, server: State, index: int) -> None:
        """At the end of a training of a random search: keep it where it is the best so far; at the very end, serve the best."""
        held, last = server["search"], index + 1 == self.federation.rounds
        if last or self.trial(index + 1) > self.trial(index):
            if held["loss"] is not None and held["loss"] < held["best_loss"]:
                held.update(best=clone(inner_part(server)), best_loss=held["loss"])
            if last and held["best"]:
                put_back(server, held["best"])

    def _losses_of(self, replies: Iterable[Reply], losses: dict[int, float]) -> Iterator[Reply]:
        for reply in replies:
            if LOSS in reply.numbers:
                losses[reply.client] = reply.numbers.pop(LOSS)
            yield reply

    def _mean_loss(self, losses: dict[int, float]) -> float:
        weights = {k: self.counts[k] if self.search.validation == "count" else 1 for k in losses}
        return math.fsum(weights[k] * loss for k, loss in losses.items()) / sum(weights.values())

    def served(self, server: State, state: State) -> Tensor:
        return self.inner.served(server, state)

    def committee(self, server: State) -> Committee | None:
        return self.inner.committee(server)

    def client_state(self, client: int) -> State:
        return self.inner.client_state(client)

    def notes(self) -> list[str]:
        return self.inner.notes()

    def report(self, server: State) -> dict[str, float]:
        held = server["search"]
        found = {"search_loss": held["loss"], "reward": held["reward"], "lost_rounds": float(held["lost"]) if held["lost"] else None}
        return {**{k: float(v) for k, v in found.items() if v is not None}, **held["shown"]}

    def traffic_in(self, round: Round, numel: int, previous_lr: float | None = None) -> Traffic:
        inner = self.inner.traffic_in(round, numel, previous_lr)
        down = {**inner.down, **dict.fromkeys(self._numbers(), 1)}
        return Traffic(down, inner.up, {**inner.answers, **({LOSS: 1} if self.reports else {})})
