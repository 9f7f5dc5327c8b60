"""What a federated method answers, and the messages that cross between server and clients.

A method is a state machine on flat vectors. It never sees a process, a file or a data loader, so the same file runs in
one process, under torchrun, and between real sites; both states are plain dicts of tensors and scalars that a
checkpoint can hold and a wire can carry.

One round of `xutrain.loops.federated`, for a method ``m`` with server state S and client states C[k]:

    round = m.configure(S, round)              hyper-parameters of this round; a search agent acts here
    for exchange in range(m.exchanges):        1 for nearly all methods; Mime uses 2
        round = m.refine(S, round, exchange)   what the exchanges before have changed; a search agent with lag 0 acts here
        replies = (m.step(C[k], m.plan(S, round, k, exchange), problem[k]) for k in round.clients)
        m.merge(S, round, replies, exchange)
    evaluate m.served(S, C[k])

* ``plan`` makes what one client is sent: tensors and numbers (both counted on the wire, 32 bits a number) and the
  hyper-parameters lr, steps and knobs that follow from the recipe (not counted). Every client gets its own copy: what a
  client does to its plan reaches nobody else. A plan may hold several models under names of its own, and may give each
  client another lr or number of steps.
* ``step`` changes the client's state in place and returns its `Reply`: tensors and numbers (counted; a validation loss
  that the algorithm needs belongs here) and measures (for the record only, not counted). The state survives rounds in
  which the client is absent, and checkpoints.
* ``merge`` receives the replies as a stream in ascending order of clients, each with its weight, and changes the server
  state in place, *after* it has used up the stream (plans are made while the stream is read). Adding in this order is
  what makes the result independent of the number of processes; a stream keeps one reply in memory at a time.
* ``served`` is the model that client k would use; with ``personal`` the evaluation visits every client.
* ``traffic`` is the closed form of what one taking-part client receives and sends in one round.

A client asks its `Problem` for gradients; wrapping the problem changes the local objective (see ``proximal.py`` and
``control.py``), so momentum, correction and fusion compose. ``value(holder, name)`` reads an option that a knob of
this round may override: an agent that puts ``knobs={"beta": 0.5}`` into the round needs no change in the method.

Several networks. A method whose `networks` declares further ones (FedSM's selector) finds their initial flat vectors in
`Federation.networks`; the loop builds each module once per process, and ``problem.of("selector")`` is the `Problem` of that
network on the same client's samples: its loss is cross-entropy to the client's own number, its score an accuracy. Flat
vectors stay the currency: such a vector travels under the name of its part ("model", "personal", "selector", "moments"),
and ``traffic_in`` says how many numbers each part has in this very round. What is served may then be more than one vector:
`committee` says which models there are and who chooses among them, and the evaluation asks it before ``served``.

Local optimizer. ``local_steps.descend`` walks P local steps with the recipe's ``train.optimizer``; whoever calls it with a memory of its
own keeps Adam's moments per client and per model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from xutrain.methods.federate.problem import Confident as Confident
from xutrain.methods.federate.problem import Networked as Networked
from xutrain.methods.federate.problem import Problem as Problem
from xutrain.methods.federate.problem import Teachable as Teachable
from xutrain.methods.federate.problem import Validated as Validated
from xutrain.registry import Named

#: A server's or a client's state: tensors, scalars, strings, and dicts or lists of them.
State = dict[str, Any]
#: number of a plan: the server has thrown away the rounds from this one on, so the client goes back to before them
UNDO = "undo"
#: knob of a plan: the training that it belongs to began with this round; a client forgets what it kept of an earlier one
SINCE = "since"


def clone(value: Any) -> Any:
    """A deep copy of a state."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, list) else value


def finite(value: Any) -> bool:
    """Whether every floating-point number of a state is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    return all(finite(v) for v in value) if isinstance(value, list) else True


@dataclass(frozen=True)
class Federation:
    """What is fixed for the whole run.

    Attributes:
        clients: number of clients K.
        weights: p_k of every client, summing to 1.
        partial: some rounds leave clients out, so a client cannot rely on having seen the previous model.
        seed: seed of the run, for methods that draw numbers (through `engine.rng.Key`).
        names: name, start and stop of each parameter in the flat vector, for methods that treat layers differently.
        shapes: the shape of each parameter, as ``names``.
        buffers: length of the statistics beside the parameters, 0 where the model has none.
        rounds: rounds R of the run, for methods that end with rounds of another kind.
        networks: initial flat vectors of the further networks that the method declares.
        optimizer: what a local step is, "sgd" or "adam".
        reset_optimizer: the local optimizer starts anew in every round.
    """

    clients: int
    weights: tuple[float, ...]
    partial: bool = False
    seed: int = 0
    names: tuple[tuple[str, int, int], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    buffers: int = 0
    rounds: int = 0
    networks: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: str = "sgd"
    reset_optimizer: bool = False


@dataclass(frozen=True)
class Network:
    """A further network that a method wants beside the model.

    Attributes:
        kind: which, a name that ``xutrain.models.selector.build_selector`` knows.
        outputs: its classes.
        slices: axial slices of a volume that one training pass looks at.
    """

    kind: str
    outputs: int
    slices: int = 12


@dataclass(frozen=True)
class Committee:
    """Several models and who chooses among them, for methods that serve more than one vector.

    Attributes:
        shared: the model for everybody, None where there is none.
        own: the model of each client.
        rule: "super" (the selector's choice where it is sure, else the shared one), "oracle" (the true client's, else the
            shared one), "ensemble" (mean of all clients' probabilities), "shared" or "own".
        selector: flat vector of the network "selector".
        gamma: the selector is followed where its largest probability is above gamma (strict); a tuple has one for each client, that
            of the most probable client counts.
    """

    shared: Tensor | None
    own: tuple[Tensor, ...]
    rule: str = "super"
    selector: Tensor | None = None
    gamma: float | tuple[float, ...] = 0.9


@dataclass(frozen=True)
class Round:
    """The configuration of one round.

    Attributes:
        index: 0, 1, 2, ...
        lr: local learning rate eta_r.
        clients: who takes part, ascending.
        steps: local steps P_k of each of them.
        weights: p_k of each of them, summing to 1.
        knobs: options of the method that this round overrides.
        lost: who was chosen and sent the plan besides, and never answers.
        lrs: local learning rate of each of them, where they differ; ``lr`` is then their p_k-weighted mean.
    """

    index: int
    lr: float
    clients: tuple[int, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    knobs: Mapping[str, float] = field(default_factory=dict)
    lost: tuple[int, ...] = ()
    lrs: tuple[float, ...] = ()

    def rate(self, client: int) -> float:
        """Local learning rate of ``client``."""
        return self.lrs[self.place(client)] if self.lrs else self.lr

    @property
    def mean_steps(self) -> float:
        """Sum of p_k P_k; exactly P when all clients do P steps."""
        if len(set(self.steps)) == 1:
            return float(self.steps[0])
        return sum(w * p for w, p in zip(self.weights, self.steps, strict=True))

    def place(self, client: int) -> int:
        """Position of ``client`` among those that take part."""
        return self.clients.index(client)


@dataclass
class Plan:
    """What one client is asked in one exchange of one round; ``round_lr`` is the round's lr where the client has its own."""

    client: int
    round: int
    lr: float
    steps: int
    mean_steps: float
    exchange: int = 0
    knobs: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    round_lr: float | None = None

    @property
    def common_lr(self) -> float:
        """The learning rate with which the server multiplies."""
        return self.lr if self.round_lr is None else self.round_lr

    def copy(self) -> Plan:
        """A plan that shares nothing with this one, as a message that crossed a wire would."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return replace(self, knobs=dict(self.knobs), tensors=tensors, numbers=dict(self.numbers))


@dataclass
class Reply:
    """What one client answers. ``client`` and ``weight`` (p_k of this round) are filled in by the loop."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    client: int = -1
    weight: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """What one taking-part client receives and sends in one round, per part.

    Attributes:
        down: numbers of 32 bits that it receives.
        up: elements of the vectors that it sends (32 bits each, or whatever the codec makes of them).
        answers: numbers of 32 bits that it sends beside them, such as a validation loss.
    """

    down: dict[str, int]
    up: dict[str, int]
    answers: dict[str, int] = field(default_factory=dict)


class FederatedMethod:
    """Base of all federated methods: plain averaging of models, one exchange a round, nothing kept by clients.

    Class attributes:
        exchanges: how many times server and clients talk in one round.
        personal: every client is served by a model of its own.
        pooled: one client holds the union of all data (the central reference).
        silent: clients and server do not talk; nothing is counted.
        own_steps: clients may do different numbers of local steps.
        tolerant: replies that are not finite are passed to ``merge`` instead of ending the run; rounds may be thrown away (`UNDO`).
        validates: clients need held-out samples of their own.
        adaptive: the local steps may be Adam's (``train.optimizer: adam``).
        plain: what is sent is not encoded (whole models and moments, which no codec of gradients fits).
        without_buffers: a client has several models, which cannot share running statistics: nets that have them are refused.
        private_buffers: batch-norm statistics stay with their clients, whatever ``train.buffers`` says.
    """

    exchanges: ClassVar[int] = 1
    personal: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    silent: ClassVar[bool] = False
    own_steps: ClassVar[bool] = True
    tolerant: ClassVar[bool] = False
    validates: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    without_buffers: ClassVar[bool] = False
    private_buffers: ClassVar[bool] = False

    class Options(Named):
        pass

    def __init__(self, options: Any, federation: Federation) -> None:
        """``options`` is an instance of this class's ``Options``."""
        self.options = options
        self.federation = federation

    @classmethod
    def networks(cls, options: Any, clients: int) -> dict[str, Network]:
        """The further networks that this method wants, by name."""
        return {}

    def notes(self) -> list[str]:
        """Remarks on these options that a reader of the result must see."""
        return []

    def value(self, holder: Round | Plan, name: str, default: float = 0.0) -> float:
        """Option ``name`` of this method, or the knob that overrides it in this round."""
        found = holder.knobs.get(name)
        return float(getattr(self.options, name, default) if found is None else found)

    def server_state(self, model: Tensor) -> State:
        """State of the server before round 0; ``model`` is the flat initial model. Holds at least ``model``."""
        return {"model": model.clone()}

    def client_state(self, client: int) -> State:
        """State of a client before it first takes part."""
        return {}

    def configure(self, server: State, round: Round) -> Round:
        """The configuration that this round really uses."""
        return round

    def refine(self, server: State, round: Round, exchange: int) -> Round:
        """The configuration of one exchange, given what the exchanges before it have said."""
        return round

    def report(self, server: State) -> dict[str, float]:
        """Numbers for the record after each round."""
        return {}

    def lost(self, server: State) -> int:
        """Rounds so far whose outcome was thrown away (tolerant methods)."""
        return 0

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        """What ``client`` is sent; the model, unless a method says otherwise."""
        steps = round.steps[round.place(client)]
        plan = Plan(client, round.index, round.rate(client), steps, round.mean_steps, exchange, dict(round.knobs))
        plan.round_lr = round.lr if round.lrs else None
        if exchange == 0:
            plan.tensors["model"] = server["model"]
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        """The client's work of one exchange."""
        raise NotImplementedError

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        """Take in the replies of one exchange."""
        raise NotImplementedError

    def served(self, server: State, state: State) -> Tensor:
        """The flat model that a client with ``state`` uses."""
        model: Tensor = server["model"]
        return model

    def received(self, state: State, plan: Plan) -> Tensor:
        """The flat model that a client has in hand when ``plan`` arrives; a search asks for its validation loss."""
        return plan.tensors["model"]

    def committee(self, server: State) -> Committee | None:
        """The models and the rule that choose for a sample; None where ``served`` says it all."""
        return None

    def traffic_in(self, round: Round, numel: int, previous_lr: float | None = None) -> Traffic:
        """``traffic`` of this very round, for methods whose rounds differ."""
        return self.traffic(numel, previous_lr)

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        """Closed form of one client's traffic in a round; ``previous_lr`` is the lr of the round before, None in round 0."""
        return Traffic(down={"model": numel}, up={"update": numel})


def weighted_mean(replies: Iterable[Reply], *names: str) -> dict[str, Tensor]:
    """Sum of p_k times each named tensor, added in the order of the stream."""
    total: dict[str, Tensor] = {}
    for reply in replies:
        for name in names:
            tensor = reply.tensors[name]
            if name not in total:
                total[name] = torch.zeros_like(tensor)
            total[name].add_(tensor, alpha=reply.weight)
    return total
