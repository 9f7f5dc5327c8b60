"""Search spaces: from a normalised sample u to legal hyper-parameters, h = c + s u with c the middle and s the width of a range.

Order of the coordinates, as in both public programs: client learning rate, local work, K aggregation weights, server
learning rate; then options of the wrapped method in alphabetical order (ours). The box of a range is u in [-1/2, 1/2]; samples
beyond it are used as they are, after the legal-value rules: learning rates at least their floor, local work
int(h + 1/2) toward zero and at least 1, weights a softmax over the clients that take part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from xutrain.methods.federate.base import Round
from xutrain.recipe.search import ClientRange, Range, Space, Weights, legal

#: values beyond it would leave float32 as soon as they are multiplied
LARGEST = 1e25


@dataclass(frozen=True)
class Coordinate:
    """One number that is drawn.

    Attributes:
        name: unique: lr, local_work, weight_3, server_lr, beta.
        key: key of the recipe's search.space.
        client: whose it is; -1 for everybody's.
        middle, width: c and s, of the logarithm on a logarithmic scale.
        low, high: legal values; beyond them a value is set to them.
        grid: normalised values of a discrete agent, ascending as in the recipe.
    """

    name: str
    key: str
    client: int
    middle: float
    width: float
    log: bool
    low: float
    high: float
    grid: tuple[float, ...]

    def value(self, u: float) -> float:
        """h of one normalised number, before the rules that depend on its key."""
        h = self.middle + self.width * u
        if self.log:
            h = math.exp(min(h, 60.0))
        return min(max(h, self.low, -LARGEST), self.high, LARGEST)


def coordinate(name: str, key: str, item: Range, within: tuple[float, float], client: int = -1) -> Coordinate:
    """The coordinate of a range, ``within`` the least and the greatest legal value."""
    log = item.scale == "log"
    low, high = (math.log(item.low), math.log(item.high)) if log else (item.low, item.high)
    middle, width = (low + high) / 2, high - low
    if item.values is not None:
        grid = tuple(((math.log(v) if log else v) - middle) / width for v in item.values)
    else:
        grid = tuple(i / (item.points - 1) - 0.5 for i in range(item.points))
    return Coordinate(name, key, client, middle, width, log, *within, grid)


class AgentSpace:
    """The coordinates of a search section, and what a sample means for a round.

    Attributes:
        coordinates: D of them, in order.
        dirichlet: aggregation weights come from a Dirichlet law beside u.
    """

    def __init__(self, space: Space, clients: int, method: Any, per_pass: Sequence[int]) -> None:
        self.space, self.clients, self.per_pass = space, clients, tuple(per_pass)
        self.coordinates: list[Coordinate] = []
        self.form = space.weights.form if space.weights is not None else ""
        self.dirichlet = self.form == "dirichlet"
        for key, item in space.named().items():
            within = legal(method, key, item)
            if isinstance(item, Weights):
                if not self.dirichlet:
                    self.coordinates += [coordinate(f"weight_{k}", key, item, within, k) for k in range(clients)]
            elif isinstance(item, ClientRange) and item.per_client:
                self.coordinates += [coordinate(f"{key}_{k}", key, item, within, k) for k in range(clients)]
            else:
                self.coordinates.append(coordinate(key, key, item, within))
        self.integers = {k for k, f in type(method).model_fields.items() if f.annotation in (int, int | None)}

    @property
    def dim(self) -> int:
        return len(self.coordinates)

    @property
    def knobs(self) -> list[str]:
        """Options of the method that are searched."""
        return [c.key for c in self.coordinates if c.key not in ("lr", "local_work", "weights")]

    def setting(self, u: Tensor, base: Round, shares: Sequence[float] = ()) -> Round:
        """The round that a sample asks for.

        Args:
            u: float64 of shape (D,).
            base: who takes part, with p_k; what is not searched stays as it says.
            shares: Dirichlet weights of all clients, where the weights are drawn so.
        """
        drawn = u.tolist()
        values = {c.name: c.value(x) for c, x in zip(self.coordinates, drawn, strict=True)}
        changes: dict[str, Any] = {}
        if self.space.lr is not None:
            lrs = self._each(values, "lr", base)
            changes["lr"] = lrs[0]
            if self.space.lr.per_client:
                changes.update(lr=sum(w * r for w, r in zip(base.weights, lrs, strict=True)), lrs=tuple(lrs))
        if self.space.local_work is not None:
            work = [max(1, int(x + 0.5)) for x in self._each(values, "local_work", base)]
            if self.space.local_work.unit == "epochs":
                work = [n * self.per_pass[k] for n, k in zip(work, base.clients, strict=True)]
            changes["steps"] = tuple(work)
        if self.dirichlet:
            changes["weights"] = _normalised([shares[k] for k in base.clients])
        elif self.form:
            raw = [values[f"weight_{k}"] for k in base.clients]
            top = max(raw)
            powers = [math.exp(x - top) for x in raw]
            if self.form == "simplex":
                powers = [p * e for p, e in zip(base.weights, powers, strict=True)]
            changes["weights"] = _normalised(powers)
        knobs = {key: self._knob(key, values[key]) for key in self.knobs}
        return replace(base, **changes, knobs={**base.knobs, **knobs})

    def _each(self, values: dict[str, float], key: str, base: Round) -> list[float]:
        return [values.get(f"{key}_{k}", values.get(key, 0.0)) for k in base.clients]

    def _knob(self, key: str, value: float) -> float:
        return float(math.floor(value + 0.5)) if key in self.integers else value

    def shown(self, u: Tensor, base: Round, shares: Sequence[float] = (), *, exact: bool = False) -> dict[str, float]:
        """What a sample, or with ``exact`` (no rounding) a policy's mean, says in the user's units: name -> value."""
        setting = self.setting(u, base, shares)
        shown: dict[str, float] = {}
        for c, x in zip(self.coordinates, u.tolist(), strict=True):
            if c.key == "local_work" and not exact:
                shown[c.name] = max(1.0, float(int(c.value(x) + 0.5)))
            elif c.key != "weights":
                shown[c.name] = c.value(x)
        if self.form:
            shown.update({f"weight_{k}": w for k, w in zip(setting.clients, setting.weights, strict=True)})
        return shown

    def spread(self, mean: Tensor, std: Tensor, base: Round) -> dict[str, float]:
        """Half the distance between the values at mean + std and mean - std, in the user's units: name -> value."""
        found: dict[str, float] = {}
        weights = dict(zip(base.clients, self.setting(mean, base).weights, strict=True)) if self.form and not self.dirichlet else {}
        for c, m, d in zip(self.coordinates, mean.tolist(), std.tolist(), strict=True):
            if c.key == "weights":
                if c.client in weights:
                    a = weights[c.client]
                    found[c.name] = a * (1 - a) * c.width * d  # first order, the others held
            else:
                found[c.name] = (c.value(m + d) - c.value(m - d)) / 2
        return found


def _normalised(values: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(values)
    return tuple(v / total for v in values)
