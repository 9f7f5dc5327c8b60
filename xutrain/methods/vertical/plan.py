"""A vertical run worked out before it starts: who asks, how often, for which rows, and what that costs to the bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xutrain import registry
from xutrain.data.tabular import VerticalData
from xutrain.engine.rng import Key
from xutrain.errors import DataError, Issue, RecipeError
from xutrain.methods.vertical.base import VerticalMethod
from xutrain.methods.vertical.losses import LOSSES, Loss
from xutrain.methods.vertical.security import INDEX, SCALAR, Message, SafeSum

_TASK_OF = {"logistic": "binary", "ridge": "regression", "softmax": "classes"}


@dataclass
class Plan:
    """What every party knows of the run.

    Attributes:
        names: parties in order. active: numbers of the label holders that ask; the first one is the leader.
        steps: local steps of each label holder. inner: local steps between snapshots. epoch: steps in one pass over the samples.
        backward: True when label holders send their signal to the others (VFB2).
        passes: "none", "barrier" or "rolling". table: the estimator starts from the reference w = 0.
    """

    names: list[str]
    active: list[int]
    n: int
    classes: int
    steps: int
    epoch: int
    inner: int
    batch: int
    mode: str
    budget: str
    in_flight: int
    backlog: int
    sampling: str
    backward: bool
    exchange: str
    passes: str
    table: bool
    seed: int
    _drawn: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, recipe: Any, data: VerticalData) -> Plan:
        """From a recipe and its data. Raises DataError for labels of another kind, RecipeError for too many totals."""
        method: type[VerticalMethod] = recipe.method_class
        if _TASK_OF[recipe.loss] != data.task:
            raise DataError(
                Issue(
                    "loss",
                    f"labels of {data.name} are of the kind {data.task}",
                    recipe.loss,
                    f"loss={next(k for k, v in _TASK_OF.items() if v == data.task)}",
                )
            )
        names = [p.name for p in data.parties]
        train, q = recipe.train, len(data.parties)
        holders = (
            list(range(q)) if recipe.labels == "all" else [names.index(p) for p in (recipe.labels or [data.label_holder])] if q > 1 else [0]
        )
        if train.batch_size > data.n:
            raise RecipeError(Issue("train.batch_size", f"the data has {data.n} rows", train.batch_size))
        epoch = max(1, data.n // train.batch_size)
        steps = train.steps or max(1, round(train.epochs * epoch))
        backward = method.backward == "dominator" and q > 1
        plan = cls(
            names=names,
            active=sorted(holders),
            n=data.n,
            classes=data.classes,
            steps=steps,
            epoch=epoch,
            inner=getattr(recipe.method, "inner", None) or epoch,
            batch=train.batch_size,
            mode=train.mode,
            budget=train.budget,
            in_flight=train.in_flight,
            backlog=0 if train.mode == "sync" else train.backlog,
            sampling=train.sampling,
            backward=backward,
            exchange=method.exchange,
            passes=method.passes(recipe.method),
            table=method.starts_with_table(recipe.method),
            seed=recipe.seed,
        )
        limit = recipe.security.totals_limit
        if limit is not None and plan.totals_per_sample > limit:
            what = f"a requester would see {plan.totals_per_sample:.1f} totals per sample"
            raise RecipeError(Issue("security.totals_limit", what, limit, "fewer epochs, or raise the limit knowingly"))
        return plan

    @property
    def q(self) -> int:
        return len(self.names)

    @property
    def leader(self) -> int:
        """The first label holder: it takes the reference sums and shares them."""
        return self.active[0]

    @property
    def collaborators(self) -> list[int]:
        """Parties without labels."""
        return [p for p in range(self.q) if p not in self.active]

    @property
    def idle(self) -> list[str]:
        """A warning where parties without labels never learn."""
        if self.backward or not self.collaborators or self.q == 1:
            return []
        names = ", ".join(self.names[p] for p in self.collaborators)
        return [f"no labels and no backward updating: the blocks of {names} stay at zero (method=vfb2 trains them)"]

    @property
    def total_steps(self) -> int:
        """Steps of all label holders together: the run's step counter ends here."""
        return self.steps * len(self.active)

    @property
    def most_steps(self) -> int:
        """Steps that one label holder can take at most: a fast one may use the whole of a shared budget."""
        return self.total_steps if self.budget == "total" else self.steps

    @property
    def snapshots(self) -> int:
        """Full passes of the run; the first reference point w = 0 needs none."""
        return (self.steps - 1) // self.inner if self.passes != "none" else 0

    @property
    def totals_per_sample(self) -> float:
        """How many totals of the average sample one requester gets to see."""
        return self.most_steps * self.batch / self.n + self.snapshots

    def rows(self, party: int, k: int) -> NDArray[np.int64]:
        """Sample indices of ``party``'s k-th step, shape (b,): uniform with replacement, keyed by the seed and the epoch."""
        stream = 0 if self.sampling == "shared" else 1 + party
        epoch, at = divmod(k, self.epoch)
        drawn = self._drawn.get((stream, epoch))
        if drawn is None:
            drawn = Key(self.seed, "vertical/index", epoch, stream).numpy().integers(self.n, size=(self.epoch, self.batch))
            for old in [key for key in self._drawn if key[0] == stream and key[1] < epoch - 2]:
                del self._drawn[old]
            self._drawn[stream, epoch] = drawn
        return drawn[at]

    def scalars(self, rows: int) -> int:
        """Numbers in a sum over ``rows`` samples."""
        return rows * (self.classes or 1)

    def ask_messages(self, safe: SafeSum, party: int) -> list[Message]:
        """Messages of one step's sum."""
        if self.exchange == "allreduce":
            return [*self._allreduce("product", self.scalars(self.batch))]
        return safe.messages(party, self.batch, self.scalars(self.batch), "product")

    def tell_messages(self, party: int) -> list[Message]:
        """Messages of one backward signal: indices and signals, to everybody else."""
        bits = INDEX * self.batch + SCALAR * self.scalars(self.batch)
        return [Message(party, p, "signal", bits, False) for p in range(self.q) if p != party]

    def pass_messages(self, safe: SafeSum) -> list[Message]:
        """Messages of one snapshot: the sum at the leader, and what it sends on."""
        count, leader = self.scalars(self.n), self.leader
        if self.exchange == "allreduce":
            return list(self._allreduce("pass", count))
        return [*safe.messages(leader, 0, count, "pass"), *self.reference_messages(True)]

    def reference_messages(self, totals: bool) -> list[Message]:
        """Reference totals for the other label holders (``totals``), reference signals for collaborators."""
        count, leader = self.scalars(self.n), self.leader
        targets = [p for p in self.active[1:] if totals] + (self.collaborators if self.backward else [])
        return [Message(leader, p, "reference", SCALAR * count, False) for p in sorted(targets)]

    def _allreduce(self, part: str, scalars: int) -> list[Message]:
        """A binomial tree up to party 0 and down again: 2 (q-1) messages."""
        up = [(p, p & (p - 1)) for p in range(1, self.q)]
        return [Message(a, b, part, SCALAR * scalars, False) for s, t in up for a, b in ((s, t), (t, s))]

    def bits(self, safe: SafeSum) -> Counter[str]:
        """Payload bits of the whole run by part, in closed form. With budget "total" all requesters cost the same in every mode."""
        found: Counter[str] = Counter()

        def add(messages: list[Message], times: int) -> None:
            for m in messages:
                found[m.part] += m.bits * times

        for party in self.active if self.exchange == "request" else [0]:
            add(self.ask_messages(safe, party), self.steps)
            if self.backward:
                add(self.tell_messages(party), self.steps)
        add(self.pass_messages(safe), self.snapshots)
        if self.table:
            add(self.reference_messages(False), 1)
        return found


def methods_of(recipe: Any, data: VerticalData, plan: Plan, parties: list[int], lrs: list[float]) -> dict[int, VerticalMethod]:
    """The method objects of the given parties."""
    loss: Loss = LOSSES[recipe.loss]()
    cls: type[VerticalMethod] = recipe.method_class
    make = {p: data.parties[p].train for p in parties}
    return {
        p: cls(recipe.method, x, loss, lr=lrs[p], l2=recipe.train.weight_decay, outputs=plan.classes, parties=plan.q)
        for p, x in make.items()
    }


def computing_times(recipe: Any, plan: Plan) -> list[float]:
    """Virtual time of one step at each party."""
    clock = recipe.time
    return [clock.compute * (1.0 + clock.delay * (name == clock.slow_party)) for name in plan.names]


def step_sizes(recipe: Any, data: VerticalData, plan: Plan, compute: list[float]) -> list[float]:
    """Step size of each party. "compensated" (ours): a party that writes seldom takes proportionally longer steps, so that its block
    moves as fast as without the straggler, but no longer than 1 / (c r + l2), where r is the 99 % quantile of its ||x_{i,l}||^2 (the
    largest row would forbid any compensation on real data, whose outliers are rare)."""
    lr = recipe.train.lr
    if recipe.train.rates == "equal":
        return [lr] * plan.q
    periods = [2 * recipe.time.latency + c for c in compute]
    longest = [longest_step(party.train, recipe) for party in data.parties]
    return [max(lr, min(lr * period / min(periods), bound)) for period, bound in zip(periods, longest, strict=True)]


def longest_step(x: Any, recipe: Any) -> float:
    """1 / (c r + l2), r the 99 % quantile of the squared row norms of a block: see ``step_sizes``."""
    norms = np.asarray(x.multiply(x).sum(axis=1)) if hasattr(x, "multiply") else np.square(x).sum(axis=1)
    return 1.0 / (LOSSES[recipe.loss]().curvature() * float(np.quantile(norms, 0.99)) + recipe.train.weight_decay)


def load_data(recipe: Any) -> VerticalData:
    """The recipe's data, in one party for pooled methods."""
    data: VerticalData = registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    return data.pooled() if recipe.method_class.pooled else data
