"""Free roll-outs: once the clients' answers are in, the server scores several draws of its own values, with no client work.

For m = 1..M the values that only the server uses (aggregation weights, server learning rate, server-side knobs) are drawn again,
the wrapped method merges a copy of its state with them, and the loss of the outcome on the server's validation samples gives
r_m = 1 - L_m / L: M rewards a round for these coordinates, instead of one a round late. Ours; the window of rewards then teaches the
clients' coordinates only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.federate.base import Reply, Round, State, clone
from xutrain.methods.federate.search.base import Noise
from xutrain.methods.federate.search.memory import inner_part, put_back, shown_of
from xutrain.methods.federate.search.reinforce import advantages, reward

if TYPE_CHECKING:
    from xutrain.methods.federate.search.searched import Searched

Judge = Callable[[Tensor], float]


def roll_out(method: Searched, server: State, round: Round, replies: Sequence[Reply], before: State) -> None:
    """Merge with the sample or the best of its roll-outs, and teach the server-side coordinates."""
    held, judge = server["search"], method.judge
    assert judge is not None
    sample = held["waiting"][-1]
    mean, std = method.agent.moments(held["agent"])
    mine = torch.tensor([method.server_side(c) for c in method.space.coordinates])
    prior = [method.federation.weights[k] for k in round.clients]
    base = replace(round, weights=tuple(w / sum(prior) for w in prior))
    shares = sample["shares"].tolist() if "shares" in sample else ()
    noise = Noise(Key(method.federation.seed, "search/rollouts", round.index))
    start = judge(method.inner.served(server, {}))
    tried: list[tuple[Tensor, State, Round, float]] = []
    for m in range(method.search.rollouts):
        u = sample["u"] if m == 0 else torch.where(mine, mean + std * noise.normal(len(mean)), sample["u"])
        state = clone(before)
        drawn = method.space.setting(u, base, shares)
        setting = round if m == 0 else replace(round, weights=drawn.weights, knobs=drawn.knobs)  # what the clients did is done
        weights = dict(zip(setting.clients, setting.weights, strict=True))
        method.inner.merge(state, setting, (replace(r, weight=weights[r.client]) for r in replies), 0)
        tried.append((u, state, setting, judge(method.inner.served(state, {}))))
    rewards = [reward(start, loss, method.search.reward, method.search.reward_clip) for *_, loss in tried]
    best = max(range(len(rewards)), key=rewards.__getitem__)
    chosen = best if method.search.rollout_apply == "best" else 0
    sample["u"] = tried[chosen][0].clone()
    held["shown"] = shown_of(method.space, sample, held, base)
    put_back(server, inner_part(tried[chosen][1]))
    if method.agent.learns and len(tried) > 1:
        adv = torch.outer(advantages(rewards, method.search.baseline), mine.to(torch.float64))
        draws: list[State] = [{"u": u, "given": {}} for u, *_ in tried]
        method.agent.improve(held["agent"], draws, adv, held["rollout_adam"])
