"""The section `search:` of a federate recipe: which hyper-parameters of a round an agent draws, and how it learns from them.

Source: Auto-FedRL (arXiv 2203.06338) and its two public programs; `preset: released` takes over what those do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import ConfigDict, Field, model_validator

from xutrain.errors import Issue
from xutrain.recipe.schema import Choice, Named, Options
from xutrain.registry import suggest

#: cells of a joint grid that are held in memory; beyond, it is refused
MOST_CELLS = 10**6

#: what the public code does where it differs from our defaults; keys that a recipe gives itself stand
RELEASED: dict[str, Any] = {"lag": 1, "released_bug": True, "reward_clip": None, "validation": "equal"}
RELEASED_AGENTS: dict[str, dict[str, Any]] = {
    "gaussian": {"init_std": 85**-0.25},
    "frozen": {"init_std": 85**-0.25},
    "mlp": {"lr": 0.01, "zero_init_head": False, "clamp": 1.0, "init_std": 85**-0.5},
}
RELEASED_FLOORS = {"server_lr": 0.1}  # GP; the NVFlare version takes 1e-4
FLOORS = {"lr": 1e-4, "server_lr": 1e-4}
#: numeric options that hold for a whole run, so that a value drawn for one round would change nothing
WHOLE_RUN: dict[str, frozenset[str]] = {
    "apfl": frozenset({"mix", "mix_lr"}),
    "ditto": frozenset({"personal_epochs"}),
    "fedrep": frozenset({"head_epochs", "body_epochs"}),
    "fedsm": frozenset({"finetune_epochs", "gamma", "gamma_quantile", "selector_epochs", "selector_rounds", "slices"}),
    "l2gd": frozenset({"pull_chance", "strength"}),
    "prr_fl": frozenset({"first_share", "last_share", "stages"}),
}
#: searched values for which a method has no use: its mean counts every client once or by its steps, or it draws its local steps
UNUSED: dict[str, frozenset[str]] = {
    "fedsm": frozenset({"weights"}),
    "l2gd": frozenset({"local_work", "weights"}),
    "prr_fl": frozenset({"weights"}),
    "softpull": frozenset({"weights"}),
}
#: local work of a round that no run gets through
MOST_WORK = 10**8
#: agents that need at least one coordinate
GRIDS_AND_NETS = ("mlp", "discrete", "discrete_factorised")


class Range(Options):
    """One searched hyper-parameter: h = c + s u with c the middle and s the width of the range."""

    low: float = Field(description="Lower end of the range; samples beyond it are used as they are.")
    high: float = Field(description="Upper end of the range.")
    scale: Literal["linear", "log"] = Field("linear", description="log: the logarithm is searched, h = exp(c + s u).")
    floor: float | None = Field(None, description="Least legal value; null: 1e-4 for learning rates, the option's own bound for knobs.")
    ceiling: float | None = Field(None, description="Greatest legal value; null: none, or the option's own bound for knobs.")
    points: int = Field(10, ge=2, le=10**6, description="Discrete agents: evenly spaced values of the range.")
    values: list[float] | None = Field(None, min_length=2, description="Discrete agents: these values instead.")

    def faults(self, where: str) -> list[Issue]:
        if not self.low < self.high:
            what = "must be less than high: the range is " + ("empty" if self.low == self.high else "reversed")
            return [Issue(f"{where}.low", what, self.low, f"high is {self.high:g}")]
        if self.scale == "log" and self.low <= 0:
            return [Issue(f"{where}.low", "must be greater than 0 on a logarithmic scale", self.low, "or scale: linear")]
        if self.floor is not None and self.floor > self.high:
            return [Issue(f"{where}.floor", "lies above the range", self.floor, f"high is {self.high:g}")]
        if self.ceiling is not None and self.ceiling < self.low:
            return [Issue(f"{where}.ceiling", "lies below the range", self.ceiling, f"low is {self.low:g}")]
        if self.floor is not None and self.ceiling is not None and self.floor > self.ceiling:
            return [Issue(f"{where}.floor", "lies above the ceiling", self.floor, f"ceiling is {self.ceiling:g}")]
        if not math.isfinite(self.high - self.low):
            return [Issue(f"{where}.high", "makes the range wider than any number", self.high, "narrow it")]
        bad = [v for v in self.values or () if v <= 0] if self.scale == "log" else []
        if bad:
            return [Issue(f"{where}.values", "must be greater than 0 on a logarithmic scale", bad[0], "or scale: linear")]
        return []

    @property
    def grid(self) -> int:
        """Values that a discrete agent has."""
        return len(self.values) if self.values is not None else self.points


class ClientRange(Range):
    """A range that every client may have for itself."""

    per_client: bool = Field(False, description="One coordinate a client instead of one for all (ours).")


class Work(ClientRange):
    """Local work."""

    unit: Literal["steps", "epochs"] = Field("steps", description="What is counted; epochs as in the public code.")


class Weights(Range):
    """Aggregation weights of the clients."""

    low: float = Field(0.1, description="Lower end of each client's range.")
    high: float = Field(1.0, description="Upper end of each client's range.")
    form: Literal["softmax", "simplex", "dirichlet"] = Field(
        "softmax",
        description="softmax of the clients' values; simplex: p_k exp(s u_k), normalised; dirichlet: drawn from a Dirichlet law.",
    )
    concentration: float = Field(5.0, gt=0, description="dirichlet: initial kappa of every client.")


class Space(Options):
    """What is searched; every further key is an option of the wrapped method."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Range] = Field(init=False)

    lr: ClientRange | None = Field(None, description="Clients' learning rate; replaces train.lr.")
    local_work: Work | None = Field(None, description="Local steps or epochs; replaces train.local_steps and local_epochs.")
    weights: Weights | None = Field(None, description="Aggregation weights; replace clients.weights.")
    server_lr: Range | None = Field(None, description="Server learning rate; replaces method.server_lr.")

    @property
    def knobs(self) -> dict[str, Range]:
        """Options of the wrapped method that are searched, in alphabetical order."""
        return dict(sorted((self.__pydantic_extra__ or {}).items()))

    def named(self) -> dict[str, Range]:
        """Every searched key in the order of the coordinates."""
        fixed: dict[str, Range | None] = {
            "lr": self.lr,
            "local_work": self.local_work,
            "weights": self.weights,
            "server_lr": self.server_lr,
        }
        return {**{k: v for k, v in fixed.items() if v is not None}, **self.knobs}


class Search(Options):
    """An agent that draws hyper-parameters each round and learns from the clients' validation loss while the one run goes on."""

    agent: Annotated[Named, Choice("agent", default="gaussian")]
    space: Space
    preset: Literal["none", "released"] = Field("none", description="released: defaults of the public code (lag, window defect, spread).")
    lag: Literal[0, 1] = Field(
        0, description="1: the loss comes with the training answer, one round late; 0: as a short answer of its own, before the draw."
    )
    window: int = Field(5, ge=1, le=10**4, description="Rewards that an update uses, Z.")
    window_update: bool = Field(True, description="false: only the newest sample's term; the baseline stays the window's.")
    released_bug: bool = Field(False, description="Keep the oldest term of the window only, as the public code does.")
    baseline: Literal["mean", "none", "leave_one_out"] = Field("mean", description="What is subtracted from a reward.")
    reward: Literal["relative", "log"] = Field("relative", description="1 - L'/L, or ln(L/L').")
    reward_clip: float | None = Field(1.0, gt=0, description="Clip rewards to [-x, x]; null: not.")
    credit: Literal["global", "client"] = Field(
        "global", description="client: coordinates of one client learn from its own loss (ours; gaussian without chol)."
    )
    validation: Literal["count", "equal"] = Field("count", description="Clients' losses weighted by validation samples, or equally.")
    antithetic: bool = Field(False, description="Odd rounds mirror the draw of the round before about the mean (ours).")
    rollouts: int = Field(
        0, ge=0, le=10**4, description="Draws of the server-side values that the server scores each round on data.val_fraction (ours)."
    )
    rollout_apply: Literal["sampled", "best"] = Field("sampled", description="Which of the roll-outs the round really uses.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("preset") != "released":
            return raw
        agent = raw.get("agent")
        if isinstance(agent, dict):
            raw = {**raw, "agent": {**RELEASED_AGENTS.get(str(agent.get("name")), {}), **agent}}
        space = raw.get("space")
        if isinstance(space, dict):
            floors = {k: {"floor": f, **space[k]} for k, f in RELEASED_FLOORS.items() if isinstance(space.get(k), dict)}
            raw = {**raw, "space": {**space, **floors}}
        return {**RELEASED, **raw}

    def issues(self, where: str, method: Named, clients: int) -> list[Issue]:
        """Everything wrong in this section, given the wrapped method's options and the number of clients."""
        named = self.space.named()
        found = [i for key, item in named.items() for i in item.faults(f"{where}.space.{key}")]
        if not named:
            hint = "for example space: {lr: {low: 5.0e-4, high: 5.0e-2}, weights: {}}"
            found.append(Issue(f"{where}.space", "is empty: there is nothing to search", has_value=False, hint=hint))
        for key in sorted(UNUSED.get(method.name, frozenset()) & named.keys()):
            why = "draws its local steps itself" if key == "local_work" else "has weights of its own"
            found.append(Issue(f"{where}.space.{key}", f"is of no use: {method.name} {why}", has_value=False, hint="leave it out"))
        if method.name == "fedsm" and getattr(method, "mode", "") == "extra":
            what = "has rounds in which no model travels, so clients have no loss to report"
            found.append(Issue(where, f"{method.name} in mode extra {what}", has_value=False, hint="method.mode=joint, or search: null"))
        for key in ("server_lr", *self.space.knobs):
            if key in named:
                found += _unknown(f"{where}.space.{key}", key, method)
        if not found:
            found += [i for key, item in named.items() for i in _never_legal(f"{where}.space.{key}", key, item, method)]
        if not found and self.agent.name == "discrete":
            found += self._too_large(where, clients)
        return [*found, *self._contradictions(where)]

    def counts(self, clients: int) -> list[tuple[int, int]]:
        """Grid values and number of coordinates of every searched key."""
        found = []
        for item in self.space.named().values():
            several = (isinstance(item, Weights) and item.form != "dirichlet") or (isinstance(item, ClientRange) and item.per_client)
            if not (isinstance(item, Weights) and item.form == "dirichlet"):
                found.append((item.grid, clients if several else 1))
        return found

    def _too_large(self, where: str, clients: int) -> list[Issue]:
        counts = self.counts(clients)
        cells, dim = math.prod(n**times for n, times in counts), sum(times for _, times in counts)
        if cells <= MOST_CELLS:
            return []
        product = " x ".join(f"{n}^{times}" if times > 1 else str(n) for n, times in counts)
        what = (
            f"the joint grid has {product} = {cells:.3g} cells, {cells * dim * 4 / 1e12:.3g} TB as float32 coordinates; "
            f"at most {MOST_CELLS:,}"
        )
        return [Issue(f"{where}.agent.name", what, "discrete", "use discrete_factorised or gaussian, or fewer points")]

    def _contradictions(self, where: str) -> list[Issue]:
        found = []
        if list(self.space.named().values()) == [self.space.weights] and self.counts(1) == [] and self.agent.name in GRIDS_AND_NETS:
            what = "has no coordinate to draw: dirichlet weights, the only searched values, have a law of their own"
            found.append(Issue(f"{where}.agent.name", what, self.agent.name, "use gaussian, or search something else besides"))
        joint = self.agent.name in ("mlp", "discrete") or getattr(self.agent, "cov", "") == "chol"
        if self.credit == "client" and joint:
            hint = "use agent gaussian with cov fixed or diag, or discrete_factorised"
            found.append(Issue(f"{where}.credit", "a joint law gives clients no terms of their own", "client", hint))
        shared = [k for k in self.space.named() if k in ("lr", "local_work")]
        if self.rollouts and len(shared) == len(self.space.named()):
            hint = "search weights or server_lr, or rollouts: 0"
            found.append(Issue(f"{where}.rollouts", "there is no server-side value to roll out", self.rollouts, hint))
        if self.rollouts and self.agent.name not in ("gaussian", "frozen"):
            found.append(Issue(f"{where}.rollouts", "only the gaussian agent learns from roll-outs", self.agent.name, "rollouts: 0"))
        if getattr(self.agent, "natural_gradient", False) and getattr(self.agent, "cov", "fixed") != "fixed":
            what = "would never be learnt: the natural gradient moves the mean only"
            found.append(Issue(f"{where}.agent.cov", what, getattr(self.agent, "cov", ""), "agent.cov: fixed, or natural_gradient: false"))
        if self.rollouts and getattr(self.agent, "cov", "fixed") != "fixed":
            found.append(Issue(f"{where}.rollouts", "needs a fixed covariance", getattr(self.agent, "cov", ""), "agent.cov: fixed"))
        return found


def bounds(method: Named, key: str) -> tuple[float | None, float | None, bool, bool]:
    """(least, greatest, least itself is illegal, greatest itself is illegal) of a method's option, as its ``Field`` declares."""
    low = high = None
    open_low = open_high = False
    for item in type(method).model_fields[key].metadata if key in type(method).model_fields else ():
        if isinstance(item, annotated_types.Ge):
            low = float(item.ge)  # type: ignore[arg-type]
        elif isinstance(item, annotated_types.Gt):
            low, open_low = float(item.gt), True  # type: ignore[arg-type]
        elif isinstance(item, annotated_types.Le):
            high = float(item.le)  # type: ignore[arg-type]
        elif isinstance(item, annotated_types.Lt):
            high, open_high = float(item.lt), True  # type: ignore[arg-type]
    return low, high, open_low, open_high


def legal(method: Named, key: str, item: Range) -> tuple[float, float]:
    """Least and greatest legal value; an open bound of a method's option is kept away from by a thousandth of the range."""
    low, high, open_low, open_high = (None, None, False, False) if isinstance(item, (ClientRange, Weights)) else bounds(method, key)
    gap = (item.high - item.low) / 1000
    least = FLOORS.get(key, -math.inf if low is None else low + gap * open_low)
    greatest = math.inf if high is None else high - gap * open_high
    return least if item.floor is None else item.floor, greatest if item.ceiling is None else item.ceiling


def _never_legal(where: str, key: str, item: Range, method: Named) -> list[Issue]:
    """A range of which no value is legal (every draw would be set to the same bound), or bounds that are not legal themselves."""
    if key == "weights":
        return []
    low, high, open_low, open_high = (0.0, None, True, False) if key == "lr" else bounds(method, key)
    if item.floor is not None and low is not None and (item.floor < low or (open_low and item.floor == low)):
        return [Issue(f"{where}.floor", f"is no legal value of {key}", item.floor, f"{'above' if open_low else 'at least'} {low:g}")]
    if item.ceiling is not None and high is not None and (item.ceiling > high or (open_high and item.ceiling == high)):
        return [Issue(f"{where}.ceiling", f"is no legal value of {key}", item.ceiling, f"{'below' if open_high else 'at most'} {high:g}")]
    least, greatest = legal(method, key, item)
    if key == "local_work":
        least, greatest = max(least, 1.0), min(greatest, float(MOST_WORK))
    if item.high < least:
        hint = f"raise it, or set {key}.floor" if key in FLOORS else "raise it"
        return [Issue(f"{where}.high", f"lies below the least legal value, {least:g}", item.high, hint)]
    if item.low > greatest:
        return [Issue(f"{where}.low", f"lies above the greatest legal value, {greatest:g}", item.low, "lower it")]
    return []


def searchable(method: Any) -> list[str]:
    """Numeric options of a method (its options, or their class), which an agent may search."""
    fields: Mapping[str, Any] = (method if isinstance(method, type) else type(method)).model_fields  # type: ignore[attr-defined]
    whole = WHOLE_RUN.get(str(fields["name"].default), frozenset()) if "name" in fields else frozenset()
    return sorted(n for n, f in fields.items() if f.annotation in (float, int, float | None, int | None) and n not in whole)


def _unknown(where: str, key: str, method: Named) -> list[Issue]:
    known = searchable(method)
    if key in known:
        return []
    if key in type(method).model_fields:
        what = "holds for a whole run" if key in WHOLE_RUN.get(method.name, ()) else "is no number"
        hint = "search one of " + ", ".join(known) if known else "search lr, local_work or weights"
        return [Issue(where, f"option {key} of {method.name} {what}", has_value=False, hint=hint)]
    near = suggest(key, known)
    rest = f"; it has {', '.join(known)}" if known else "; it has no numeric option"
    hint = (f"did you mean {near}?" if near else "besides lr, local_work and weights, options of the method can be searched") + rest
    return [Issue(where, f"the method {method.name} has no such option to search", has_value=False, hint=hint)]


def contradictions(recipe: Any) -> list[Issue]:
    """What a recipe's search section and its other sections cannot have at once."""
    search: Search = recipe.search
    found = search.issues("search", recipe.method, recipe.clients.count)
    if recipe.clients.val_fraction == 0 and getattr(recipe.data, "val_fraction", None) is not None and search.agent.name != "fixed":
        what = "leaves no samples for validation, and an agent learns from the clients' validation loss"
        found.append(Issue("clients.val_fraction", what, 0, "for example clients.val_fraction=0.1"))
    if search.space.lr is not None and recipe.schedule != type(recipe.schedule)():
        hint = "leave the schedule out, or do not search lr"
        found.append(Issue("schedule.name", "a searched learning rate follows no schedule", recipe.schedule.name, hint))
    if search.credit == "client" and recipe.clients.fraction < 1:
        found.append(Issue("search.credit", "needs every client's loss in every round", "client", "clients.fraction=1"))
    if search.rollouts and not getattr(recipe.data, "val_fraction", 1):
        what = "needs validation samples at the server, and there are none"
        found.append(Issue("search.rollouts", what, search.rollouts, "for example data.val_fraction=0.1"))
    trials = getattr(search.agent, "trials", 1)
    if trials > recipe.train.rounds:
        found.append(Issue("search.agent.trials", f"more than the {recipe.train.rounds} rounds", trials, "lower it, or raise train.rounds"))
    return found
