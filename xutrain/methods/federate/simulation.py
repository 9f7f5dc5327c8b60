"""A method on problems in memory, without data, files or processes: for tests of its mathematics, and for quick studies.

``Simulation("domo", quadratics(5), steps=5, lr=0.05).run(100)`` returns the server's model; ``Quadratic`` and ``Linear``
are clients in double precision whose answers are known in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xutrain.methods.federate.base import FederatedMethod, Federation, Reply, Round, State
from xutrain.registry import load


class Quadratic:
    """F(y) = 1/2 (y - b)' A (y - b) with full gradients."""

    def __init__(self, curvature: Tensor, centre: Tensor) -> None:
        self.curvature, self.centre = curvature, centre

    def gradient(self, point: Tensor, step: int) -> Tensor:
        return self.curvature @ (point - self.centre)

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.gradient(point, 0)

    def validation_gradient(self, point: Tensor) -> Tensor:
        return self.gradient(point, 0)

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        away = point - self.centre
        return {"loss": 0.5 * float(away @ self.curvature @ away)}


class Linear:
    """F(y) = <c, y>: a constant gradient."""

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def gradient(self, point: Tensor, step: int) -> Tensor:
        return self.slope.clone()

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.slope.clone()

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        return {"loss": float(point @ self.slope)}


def quadratics(clients: int = 5, n: int = 6, seed: int = 0) -> list[Quadratic]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(clients):
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        curvature = root @ root.T / n + 0.3 * torch.eye(n, dtype=torch.float64)
        made.append(Quadratic(curvature, torch.randn(n, generator=generator, dtype=torch.float64)))
    return made


def optimum(problems: Sequence[Quadratic], weights: Sequence[float] | None = None) -> Tensor:
    weights = weights or [1 / len(problems)] * len(problems)
    a = sum(w * p.curvature for w, p in zip(weights, problems, strict=True))
    b = sum(w * p.curvature @ p.centre for w, p in zip(weights, problems, strict=True))
    return torch.linalg.solve(a, b)


class Simulation:
    """Server and clients of one method; ``run`` does rounds and keeps every state that a test may ask for."""

    def __init__(
        self,
        name: str,
        problems: Sequence[Any],
        *,
        start: Tensor | None = None,
        steps: int | Sequence[int] = 5,
        lr: float | Callable[[int], float] = 0.05,
        weights: Sequence[float] | None = None,
        partial: bool = False,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        k = len(problems)
        cls = load("method", name, verb="federate")
        self.problems = problems
        self.weights = tuple(weights or [1 / k] * k)
        self.steps = (steps,) * k if isinstance(steps, int) else tuple(steps)
        self.lr = lr if callable(lr) else lambda _: lr
        self.method: FederatedMethod = cls(cls.Options(name=cls.entry.name, **options), Federation(k, self.weights, partial))
        if start is None:
            start = torch.linspace(-1, 1, 6, dtype=dtype)
        self.server = self.method.server_state(start.clone())
        self.clients: list[State] = [self.method.client_state(c) for c in range(k)]
        self.round = 0
        self.replies: list[Reply] = []
        self.sent = {"down": 0, "up": 0}

    @property
    def x(self) -> Tensor:
        return self.server["model"]

    def one(self, chosen: Sequence[int] | None = None, order: Sequence[int] | None = None) -> None:
        """One round; ``order`` is the order in which the server adds the replies (ascending by default)."""
        chosen = tuple(range(len(self.problems))) if chosen is None else tuple(chosen)
        total = sum(self.weights[c] for c in chosen)
        weights = tuple(self.weights[c] / total for c in chosen) if len(chosen) < len(self.problems) else self.weights
        setting = Round(self.round, self.lr(self.round), chosen, tuple(self.steps[c] for c in chosen), weights)
        setting = self.method.configure(self.server, setting)
        self.replies = []
        for exchange in range(self.method.exchanges):
            self.method.merge(self.server, setting, self._replies(setting, exchange, order or chosen), exchange)
        self.round += 1

    def _replies(self, setting: Round, exchange: int, order: Sequence[int]) -> Iterator[Reply]:
        for client in order:
            plan = self.method.plan(self.server, setting, client, exchange).copy()
            self.sent["down"] += sum(t.numel() for t in plan.tensors.values()) + len(plan.numbers)
            reply = self.method.step(self.clients[client], plan, self.problems[client])
            self.sent["up"] += sum(t.numel() for t in reply.tensors.values()) + len(reply.numbers)
            reply.client, reply.weight = client, setting.weights[setting.place(client)]
            self.replies.append(reply)
            yield reply

    def run(self, rounds: int, **kwargs: Any) -> Tensor:
        for _ in range(rounds):
            self.one(**kwargs)
        return self.x
