"""State that a search keeps beside the wrapped method's: copies to go back to, and what the record says of a sample."""

from __future__ import annotations

from typing import Any

import torch

from xutrain.methods.federate.base import Round, State, clone
from xutrain.methods.federate.search import dirichlet
from xutrain.methods.federate.search.reinforce import reward
from xutrain.methods.federate.search.space import AgentSpace

#: clients whose aggregation weights are recorded one by one
SHOWN = 32


def inner_part(server: State) -> State:
    """The wrapped method's share of a server state."""
    return {k: v for k, v in server.items() if k != "search"}


def put_back(server: State, safe: State) -> None:
    """Make the wrapped method's share what ``safe`` says, sharing nothing with it."""
    for key in list(inner_part(server)):
        del server[key]
    server.update(clone(safe))


def score_of(search: Any, before: float | None, after: float | None, common: float) -> float:
    """One client's reward; everybody's where its loss is not known twice."""
    return common if before is None or after is None else reward(before, after, search.reward, search.reward_clip)


def shown_of(space: AgentSpace, sample: State, held: State, base: Round) -> dict[str, float]:
    """What the record says of a sample and of the policy that it came from, in the user's units.

    ``sample_X`` the drawn values, ``policy_mean_X`` the law's mean, ``policy_std_X`` half the distance between mean + and - one deviation.
    """
    shares: list[float] = sample["shares"].tolist() if "shares" in sample else []
    expected, deviation = dirichlet.moments(held["dirichlet"]) if shares else (torch.empty(0), torch.empty(0))
    mean, std = held["policy"]
    parts = {
        "sample": space.shown(sample["u"], base, shares),
        "policy_mean": space.shown(mean, base, expected.tolist(), exact=True),
        "policy_std": {**space.spread(mean, std, base), **{f"weight_{k}": d for k, d in enumerate(deviation.tolist())}},
    }
    few = space.clients <= SHOWN
    return {f"{part}_{n}": float(v) for part, named in parts.items() for n, v in named.items() if few or not n.startswith("weight_")}
