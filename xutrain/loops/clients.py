"""The clients of a federated run: their shards, the order of their batches, their gradients, and what they keep.

A batch is addressed by (client, how many local steps the client has done in its life): so a resumed run, or one on another
number of processes, takes the same samples. All clients of a process share one module, which is pointed at a client's vector.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xutrain.data.base import Batch, Task
from xutrain.engine.context import Context
from xutrain.engine.replica import Replica, clip_norm
from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.loops.networks import Extra, WhoseSample
from xutrain.methods.federate.base import State, clone


@dataclass(frozen=True)
class Shard:
    """One client's samples.

    Attributes:
        train: indices that it trains on.
        val: indices that it keeps aside.
        batch_size: samples of a local step.
        per_pass: local steps of one pass.
        steps: local steps of a round, P_k.
    """

    train: Tensor
    val: Tensor
    batch_size: int
    per_pass: int
    steps: int

    def order(self, client: int, pass_: int, seed: int) -> Tensor:
        """The client's samples in the order of pass ``pass_``; what does not fill a batch is left out at its end."""
        return self.train[torch.randperm(len(self.train), generator=Key(seed, "pass", pass_, client).generator())]


def shards(
    parts: list[Any],
    clients: Any,
    train: Any,
    seed: int,
    *,
    pooled: bool = False,
    aside: Tensor | None = None,
    cases: Sequence[str] | None = None,
) -> list[Shard]:
    """Shards of a partition under a recipe's ``clients`` and ``train`` sections.

    With ``pooled`` the first client holds the union, with a batch K times as large and as many steps as the others would do.

    Raises:
        RecipeError: a batch is larger than the smallest client's shard, or a client's validation part is empty.

    ``aside`` (bool, one a training sample) marks what the data set itself keeps for validation; it wins over val_fraction. ``cases``
    names the case (volume or person) of each training sample: a case is never in both parts, so a part may be larger than asked for.
    """
    held = []
    for k, part in enumerate(parts):
        if aside is not None:
            mine, out = torch.from_numpy(part), aside[torch.from_numpy(part)]
            if bool(out.all()):
                raise RecipeError(Issue("partition", f"client {k} has validation samples only", has_value=False, hint="change it"))
            held.append((mine[~out].sort().values, mine[out].sort().values))
            continue
        draw = Key(seed, "client-split", 0, k).generator()
        kept = round(clients.val_fraction * len(part))
        if cases is None:
            order = torch.from_numpy(part)[torch.randperm(len(part), generator=draw)]
        else:
            order, kept = _by_case(torch.from_numpy(part), [cases[i] for i in part], draw, kept)
        if clients.val_fraction and (kept == 0 or kept == len(part)):
            what = f"leaves client {k} with {kept} validation and {len(part) - kept} training samples"
            raise RecipeError(Issue("clients.val_fraction", what, clients.val_fraction, "change it, or the partition"))
        held.append((order[kept:].sort().values, order[:kept].sort().values))
    smallest = min(range(len(held)), key=lambda k: len(held[k][0]))
    least = len(held[smallest][0])
    if clients.steps == "equal" and train.batch_size > least:
        hint = f"at most {least}, or fewer clients, or clients.steps=own (small clients then take smaller batches)"
        raise RecipeError(Issue("train.batch_size", f"larger than the shard of client {smallest}, {least} samples", train.batch_size, hint))
    made = []
    for mine, val in held:
        batch = min(train.batch_size, len(mine))
        per_pass = max(1, (least if clients.steps == "equal" else len(mine)) // batch)
        made.append(Shard(mine, val, batch, per_pass, train.local_steps or max(1, math.floor(train.local_epochs * per_pass + 1e-9))))
    if pooled:
        union = torch.cat([s.train for s in made]).sort().values
        batch = sum(s.batch_size for s in made)
        steps = round(sum(s.steps for s in made) / len(made))
        none = union[:0]
        val = torch.cat([s.val for s in made])
        return [Shard(union, val, batch, max(1, len(union) // batch), steps), *(Shard(none, none, 1, 1, steps) for _ in made[1:])]
    return made


def _by_case(part: Tensor, cases: list[str], draw: torch.Generator, kept: int) -> tuple[Tensor, int]:
    """Samples ordered by cases that are drawn one after the other, and how many make up the first whole cases with ``kept`` of them."""
    names = list(dict.fromkeys(cases))
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, case in enumerate(cases):
        rows[case].append(row)
    drawn = [rows[names[i]] for i in torch.randperm(len(names), generator=draw).tolist()]
    ends = torch.tensor([len(r) for r in drawn]).cumsum(0)
    whole = int(ends[int((ends < kept).sum())]) if kept else 0
    return part[torch.tensor([row for r in drawn for row in r])], whole


class Bench:
    """The module that all clients of this process use in turn."""

    def __init__(self, task: Task, replica: Replica, ctx: Context, train: Any, eval_batch: int) -> None:
        self.task, self.replica, self.ctx, self.train = task, replica, ctx, train
        self.eval_batch = eval_batch
        if train.entropy_coef and task.labels is None:
            what = "is a term of a classifier's softmax, and this data set has no classes"
            raise RecipeError(Issue("train.entropy_coef", what, train.entropy_coef, "set it to 0"))
        self._at: Tensor | None = None

    def point(self, vector: Tensor) -> None:
        """Point the module at ``vector``; changes of the vector in place are seen."""
        if vector is not self._at:
            self.replica.point(vector)
            self._at = vector

    def gradient(self, vector: Tensor, batch: Batch, teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss (detached) and its flat gradient at ``vector``; with a teacher the gradient is of loss + KL(teacher || student)."""
        placed = batch.to(self.ctx.device)
        wanted = None
        if teacher is not None:
            self.point(teacher)
            with torch.no_grad(), self._precision():
                wanted = self.replica.module(placed.inputs)
        self.point(vector)
        self.replica.zero_grad()
        with self._precision():
            outputs = self.replica.module(placed.inputs)
            loss = self.task.loss(outputs, placed)
        if self.train.entropy_coef:
            loss = loss + self.train.entropy_coef * entropy_gap(outputs, self.train.entropy_target)
        whole = loss if wanted is None else loss + divergence(wanted, outputs)
        whole.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), self.replica.grad()

    def _precision(self) -> Any:
        return torch.autocast(self.ctx.device.type, torch.bfloat16) if self.train.precision == "bf16" else contextlib.nullcontext()


def entropy_gap(logits: Tensor, target: float) -> Tensor:
    """max(0, target - H), H the batch mean of the softmax entropy in nats of logits (b, C); keeps a network unsure (Auto-FedRL's code)."""
    log_p = logits.log_softmax(dim=1)
    return (target + (log_p.exp() * log_p).sum(dim=1).mean()).clamp_min(0.0)


@dataclass
class ClientData:
    """A client's `Problem` (see ``methods/federate/base.py``) during one exchange.

    Attributes:
        taken: local steps that the client did before this round.
        losses: sum of the minibatch losses seen at the local steps, and their number, for the record.
    """

    bench: Bench
    client: int
    shard: Shard
    taken: int
    losses: Tensor | None = None
    counted: int = 0
    extras: dict[str, Extra] = field(default_factory=dict)
    _order: tuple[int, Tensor] | None = field(default=None, repr=False)

    def batch(self, step: int) -> Batch:
        """Samples of local step ``step`` of this round."""
        seed, t = self.bench.ctx.seed, self.taken + step
        pass_, at = divmod(t, self.shard.per_pass)
        if self._order is None or self._order[0] != pass_:
            self._order = (pass_, self.shard.order(self.client, pass_, seed))
        size = self.shard.batch_size
        return self.bench.task.batch(self._order[1][at * size : (at + 1) * size], Key(seed, "augment", t, self.client))

    def gradient(self, point: Tensor, step: int) -> Tensor:
        return self._step(point, step)

    def _step(self, point: Tensor, step: int, teacher: Tensor | None = None) -> Tensor:
        loss, gradient = self.bench.gradient(point, self.batch(step), teacher)
        self.losses = loss if self.losses is None else self.losses + loss
        self.counted += 1
        return self._finished(gradient, point)

    def _finished(self, gradient: Tensor, point: Tensor) -> Tensor:
        """A minibatch gradient with weight decay, clipped."""
        if self.bench.train.weight_decay:
            gradient.add_(point, alpha=self.bench.train.weight_decay)
        return clip_norm(gradient, self.bench.train.clip_norm)

    def validation_gradient(self, point: Tensor) -> Tensor:
        """Gradient at ``point`` of the mean loss over the client's held-out samples, statistics and dropout as in training."""
        rows, bench = self.shard.val, self.bench
        assert len(rows), "methods with ``validates`` are checked before the first round"
        held = bench.replica.buffers() if bench.replica.num_buffer_elements else None
        total = torch.zeros_like(point)
        for chunk in rows.split(bench.eval_batch):
            total.add_(bench.gradient(point, bench.task.plain(chunk))[1], alpha=len(chunk) / len(rows))
        if held is not None:
            bench.replica.load_buffers(held)
        return total

    def full_gradient(self, point: Tensor) -> Tensor:
        replica, seed = self.bench.replica, self.bench.ctx.seed
        held = replica.buffers() if replica.num_buffer_elements else None
        total = torch.zeros_like(point)
        for i, indices in enumerate(self.shard.train.split(self.bench.eval_batch)):
            batch = self.bench.task.batch(indices, Key(seed, f"full/{i}", self.taken, self.client))
            total.add_(self.bench.gradient(point, batch)[1], alpha=len(indices) / len(self.shard.train))
            if held is not None:
                replica.load_buffers(held)
        if self.bench.train.weight_decay:
            total.add_(point, alpha=self.bench.train.weight_decay)
        return total

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        assert split in ("val", "train"), split
        indices = self.shard.val if split == "val" else self.shard.train
        if not len(indices):
            return {}
        self.bench.point(point)
        module, sums = self.bench.replica.module, dict[str, list[float]]()
        module.eval()
        with torch.no_grad():
            for chunk in indices.split(self.bench.eval_batch):
                batch = self.bench.task.plain(chunk).to(self.bench.ctx.device)
                for name, (value, weight) in self.bench.task.score(module(batch.inputs), batch).items():
                    held = sums.setdefault(name, [0.0, 0.0])
                    held[0] += value
                    held[1] += weight
        module.train()
        return {name: value / weight for name, (value, weight) in sums.items() if weight}

    def of(self, name: str) -> WhoseSample:
        """This client's problem for a further network."""
        return WhoseSample(self.extras[name], self)

    def taught_gradient(self, point: Tensor, teacher: Tensor, step: int) -> Tensor:
        """Gradient of the loss plus KL(teacher || student), pixelwise Bernoulli on sigmoids or over classes; the teacher is fixed."""
        return self._step(point, step, teacher)

    @property
    def mean_loss(self) -> float:
        """Mean minibatch loss of this exchange; nan before any."""
        return float("nan") if self.losses is None else float(self.losses) / self.counted


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) of logits: over the classes of (b, C), of every pixel's sigmoid for masks (b, C, ...)."""
    if student.ndim == 2:
        return nn.functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    p = torch.sigmoid(teacher)
    cross = nn.functional.binary_cross_entropy_with_logits(student, p)
    return cross - nn.functional.binary_cross_entropy_with_logits(teacher, p)


#: rounds that a client can go back: the one that was thrown away and, where losses come late, the one trained from it
DEPTH = 2


@dataclass
class Kept:
    """What a client keeps between rounds: the method's state, its own buffers, what the codec lost.

    ``past`` holds copies of it from before its last rounds, with their numbers, where a server may throw rounds away.
    """

    state: State
    buffers: Tensor | None = None
    residual: dict[str, Tensor] = field(default_factory=dict)
    past: list[tuple[int, Kept]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.state or self.residual) and self.buffers is None

    def remember(self, round: int) -> None:
        """Note what is kept before ``round``; once a round."""
        if not self.past or self.past[-1][0] != round:
            copy = Kept(clone(self.state), None if self.buffers is None else self.buffers.clone(), clone(self.residual))
            self.past = [*self.past, (round, copy)][-DEPTH:]

    def undo(self, round: int) -> None:
        """Go back to before the first remembered round that is not before ``round``."""
        for i, (index, before) in enumerate(self.past):
            if index >= round:
                self.state, self.buffers, self.residual, self.past = before.state, before.buffers, before.residual, self.past[:i]
                return

    def pack(self) -> State:
        packed: State = {"state": self.state, "residual": self.residual}
        if self.buffers is not None:
            packed["buffers"] = self.buffers
        if self.past:
            packed["past"] = [[index, before.pack()] for index, before in self.past]
        return packed

    @classmethod
    def unpack(cls, packed: State) -> Kept:
        past = [(int(index), cls.unpack(before)) for index, before in packed.get("past", [])]
        return cls(packed["state"], packed.get("buffers"), packed["residual"], past)
