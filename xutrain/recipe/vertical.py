"""The recipe of `xutrain vertical`: parties with different features of the same entities."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from xutrain import registry
from xutrain.errors import Issue
from xutrain.recipe.schema import Choice, Named, Options, Recipe


class VerticalTrain(Options):
    """How long, in what steps, and who waits for whom."""

    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over the samples per label holder; or give steps")
    steps: int | None = Field(None, ge=1, le=10**12, description="local steps per label holder; wins over epochs")
    batch_size: int = Field(1, ge=1, le=10**7, description="samples per step (the paper: 1)")
    lr: float = Field(0.01, gt=0, le=1e6, description="constant step size gamma")
    weight_decay: float = Field(1e-4, ge=0, le=1e3, description="lambda of the objective's (lambda/2) ||w||^2")
    mode: Literal["async", "sync"] = Field("async", description="async: nobody waits; sync: all label holders write together")
    sampling: Literal["shared", "independent"] = Field(
        "shared", description="one index sequence for all label holders (the authors' program), or one each"
    )
    in_flight: int = Field(1, ge=1, le=1024, description="requests that a label holder keeps under way")
    budget: Literal["local", "total"] = Field(
        "local", description="local: each label holder takes its steps; total: fast ones take over the slow ones' steps"
    )
    backlog: int = Field(4, ge=0, le=10**6, description="vfb2, async: signals a collaborator may be behind before the label holder waits")
    rates: Literal["equal", "compensated"] = Field("equal", description="compensated: slow parties take proportionally longer steps (ours)")


class Security(Options):
    """How the sum of private products is taken."""

    mode: Literal["pairwise", "tree", "plain"] = Field(
        "pairwise", description="pairwise masks; masks over two trees (the paper); or nothing"
    )
    trees: Literal["auto", "chain", "binomial", "same_star", "given"] = Field(
        "auto", description="tree: which pair; pairs that leak to one party are refused"
    )
    t1: list[int] | None = Field(
        None, description="trees=given: parents in the first tree, -1 for the root, which stands for the requester"
    )
    t2: list[int] | None = Field(None, description="trees=given: parents in the second tree")
    totals_limit: int | None = Field(None, ge=1, description="refuse a run in which a requester sees more totals per sample than this")


class VirtualTime(Options):
    """The clock of a simulation, in units of one fast step's computation."""

    latency: float = Field(0.25, ge=0, description="one way, per message")
    compute: float = Field(1.0, gt=0, description="one step of a party that is not slow")
    slow_party: str | None = Field(None, description="the straggler")
    delay: float = Field(0.0, ge=0, description="extra fraction of its computation that the straggler needs")
    full_pass: float = Field(0.1, ge=0, description="a full pass, as a fraction of one epoch's steps")


class VerticalEval(Options):
    """What is measured, by an observer whose look costs no message in a simulation."""

    every_epochs: float | None = Field(1.0, gt=0, description="epochs between evaluations; null: only at the end")
    every: int | None = Field(None, ge=1, description="steps between evaluations; wins over every_epochs")
    reference: bool = Field(True, description="solve for the optimum and report the gap (up to max_dim columns)")
    alone: bool = Field(False, description="solve for each party's own optimum and report its own AUC (binary)")
    max_dim: int = Field(500, ge=1, description="no exact solution above this many columns")


class Network(Options):
    """Real parties: where they listen, and how patient they are."""

    run: str = Field("run", min_length=1, max_length=80, description="name of the run, part of every message")
    addresses: dict[str, str] = Field(default_factory=dict, description="party: host:port that the others reach it at")
    timeout_s: float = Field(10.0, gt=0, description="deadline of one request")
    patience_s: float = Field(60.0, gt=0, description="how long an unreachable party is waited for before the run stops with a checkpoint")
    lost: Literal["wait", "go_on"] = Field("wait", description="wait for an absent party, or sum without it while two others are there")
    step_ms: float = Field(
        0.0, ge=0, le=10_000, description="artificial computing time per step, for straggler experiments; time.delay lengthens it"
    )
    max_message_mb: int = Field(64, ge=1, le=1024, description="larger messages are refused")


class VerticalRecipe(Recipe):
    """Data, parties, labels, method, security and clock of a vertical run."""

    data: Annotated[Named, Choice("dataset")]
    method: Annotated[Named, Choice("method", default="afsgd")]
    loss: Literal["logistic", "ridge", "softmax"] = Field("logistic", description="loss of the total inner product")
    labels: Literal["all"] | list[str] | None = Field(
        None, description="who holds labels: all, names of parties, or null for the data's own holder"
    )
    train: VerticalTrain = VerticalTrain()
    security: Security = Security()
    time: VirtualTime = VirtualTime()
    eval: VerticalEval = VerticalEval()
    network: Network = Network()

    @property
    def method_class(self) -> Any:
        return registry.load("method", self.method.name, verb="vertical", where="method.name")

    @property
    def party_names(self) -> list[str]:
        """Names of the parties in order; one "pooled" party for the centralised reference."""
        return ["pooled"] if self.method_class.pooled else list(self.data.party_names())  # type: ignore[attr-defined]

    @property
    def participants(self) -> int:
        return len(self.party_names)

    @property
    def participants_key(self) -> str:
        return "data.parties"

    def issues(self) -> list[Issue]:
        found = super().issues()
        if not hasattr(self.data, "party_names"):
            return [
                *found,
                Issue(
                    "data.name",
                    "is no feature-partitioned data set",
                    self.data.name,
                    "one of breast_cancer, german_credit, party_files, libsvm, ...",
                ),
            ]
        method, names, train = self.method_class, self.party_names, self.train
        rolling = method.passes(self.method) == "rolling"
        if train.epochs is None and train.steps is None:
            found.append(Issue("train", "says neither epochs nor steps", hint="set train.epochs=10", has_value=False))
        if len(set(names)) != len(names):
            found.append(Issue("data.files", "party names repeat", names))
        if isinstance(self.labels, list) and not method.pooled:
            unknown = [p for p in self.labels if p not in names]
            if unknown or not self.labels:
                found.append(Issue("labels", "must name parties", self.labels, f"parties: {', '.join(names)}"))
            elif len(set(self.labels)) < len(self.labels):
                found.append(Issue("labels", "names a party twice", self.labels))
        if self.time.slow_party is not None and self.time.slow_party not in names and not method.pooled:
            found.append(Issue("time.slow_party", "is no party", self.time.slow_party, f"parties: {', '.join(names)}"))
        if method.lockstep and train.mode != "sync":
            found.append(Issue("train.mode", f"{self.method.name} is defined in lock step only", train.mode, "train.mode=sync"))
        if method.exchange == "allreduce":
            if self.labels != "all":
                found.append(Issue("labels", f"{self.method.name} needs labels everywhere", self.labels, "labels=all"))
            if self.security.mode != "plain":
                found.append(
                    Issue("security.mode", f"{self.method.name} is an unmasked baseline", self.security.mode, "security.mode=plain")
                )
        if self.method.name == "fdml" and self.loss != "softmax":
            found.append(Issue("loss", "fdml averages softmax models", self.loss, "loss=softmax with a data set of classes"))
        if train.mode == "sync" and train.in_flight > 1:
            found.append(
                Issue("train.in_flight", "lock step has one request under way", train.in_flight, "train.in_flight=1 or train.mode=async")
            )
        if train.budget == "total" and (train.mode == "sync" or (method.passes(self.method) == "barrier")):
            found.append(
                Issue(
                    "train.budget",
                    "total needs parties that do not wait for each other",
                    "total",
                    "train.mode=async and method.snapshot=rolling, or train.budget=local",
                )
            )
        if train.mode == "sync" and rolling:
            found.append(Issue("method.snapshot", "lock step takes its snapshots at a barrier", "rolling", "method.snapshot=barrier"))
        if train.rates == "compensated" and method.backward != "none":
            found.append(
                Issue("train.rates", "with backward updating all blocks move at the same pace already", "compensated", "train.rates=equal")
            )
        if self.security.mode == "tree" and len(names) > 1:
            found += _tree_issues(self.security, len(names))
        return found


def _tree_issues(security: Security, parties: int) -> list[Issue]:
    from xutrain.errors import RecipeError
    from xutrain.methods.vertical.security import trees

    try:
        trees.pair(security.trees, parties, security.t1, security.t2)
    except RecipeError as error:
        return error.issues
    return []
