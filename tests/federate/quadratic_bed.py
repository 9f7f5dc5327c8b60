"""The quadratic test-bed on numpy's own streams, as its table was measured: agents of the package, clients in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xutrain.engine.rng import Key
from xutrain.methods.federate.base import Round
from xutrain.methods.federate.search.base import Agent
from xutrain.methods.federate.search.reinforce import advantages, reward
from xutrain.methods.federate.search.space import AgentSpace
from xutrain.recipe.resolve import options
from xutrain.recipe.search import Space
from xutrain.registry import Named

CLIENTS, DIM = 8, 20
SPACE = {
    "lr": {"low": 5e-4, "high": 5e-2},
    "local_work": {"low": 2.0, "high": 40.0},
    "weights": {"low": 0.1, "high": 1.0},
    "server_lr": {"low": 0.5, "high": 1.5},
}


class NoOptions(Named):
    name: str = "none"


def space(clients: int = CLIENTS, method: Any = None, per_pass: int = 1, **changes: Any) -> AgentSpace:
    """The ranges of the public code."""
    mapping = {k: v for k, v in {**SPACE, **changes}.items() if v is not None}
    return AgentSpace(Space.model_validate(mapping), clients, NoOptions() if method is None else method, [per_pass] * clients)


def agent(name: str, over: AgentSpace | None = None, seed: int = 0, **values: Any) -> Agent:
    """An agent of the package."""
    cls, chosen = options("agent", name, values)
    built: Agent = cls(chosen, over or space(), Key(seed, "agent"))  # type: ignore[call-arg]
    return built


class Stream:
    """Noise of an agent from a numpy generator that other draws share."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def normal(self, n: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(n))


@dataclass
class Outcome:
    excess: float
    means: np.ndarray
    losses: list[float]
    rewards: list[float]


def play(
    actor: Agent | None, seed: int, rounds: int, *, oldest: bool = False, window: int = 5, same: bool = False, noise: float = 0.3
) -> Outcome:
    """One run; ``actor`` None is the fixed centre. ``same``: all clients share one optimum."""
    first = np.random.default_rng(seed)
    h = np.exp(first.uniform(np.log(0.1), np.log(10), (CLIENTS, DIM)))
    centre = first.standard_normal((CLIENTS, DIM))
    if same:
        centre[:] = centre[0]
    best = (h * centre).sum(0) / h.sum(0)

    def f(w: np.ndarray) -> float:
        return float((0.5 * h * (w - centre) ** 2).sum(1).mean())

    second = np.random.default_rng(1000 + seed)
    w = 5 * second.standard_normal(DIM)
    over = actor.space if actor is not None else space()
    state = actor.start() if actor is not None else {}
    memory: list[dict[str, Any]] = []
    losses: list[float] = []
    rewards: list[float] = []
    base = Round(0, 0.0, tuple(range(CLIENTS)), (1,) * CLIENTS, (1 / CLIENTS,) * CLIENTS)
    for q in range(rounds):
        losses.append(f(w))
        if q:
            rewards.append(reward(losses[-2], losses[-1], clip=None))
            memory[-1]["reward"] = rewards[-1]
            memory = memory[-window:]
            if actor is not None and actor.learns and len(memory) > 1:
                weights = advantages([m["reward"] for m in memory], oldest=oldest)
                actor.improve(state, memory, weights[:, None].expand(-1, over.dim))
        u, given = actor.draw(state, Stream(second)) if actor is not None else (torch.zeros(over.dim, dtype=torch.float64), {})  # type: ignore[arg-type]
        memory.append({"u": u, "given": given})
        setting = over.setting(u, base)
        xi = noise * second.standard_normal((CLIENTS, setting.steps[0], DIM))
        y = np.tile(w, (CLIENTS, 1))
        for p in range(setting.steps[0]):
            y = y - setting.lr * (h * (y - centre) + xi[:, p])
        w = w + setting.knobs["server_lr"] * (np.array(setting.weights) @ (y - w))
    means = actor.moments(state)[0].numpy() if actor is not None else np.zeros(over.dim)
    return Outcome(f(w) - f(best), means, losses, rewards)
