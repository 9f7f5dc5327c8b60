"""Local steps on a flat vector: plain SGD, or Adam whose moments a client keeps from round to round.

Adam (Kingma and Ba, 2015) as torch.optim.Adam computes it, without weight decay, beta .9 and .999, eps 1e-8:
  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
The memory is a plain dict {"first", "second", "count"}, so a checkpoint holds it and FedSM can average it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xutrain.methods.federate.base import Federation, Plan, Problem, State

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def adam(gradient: Tensor, memory: State) -> Tensor:
    """Adam's direction for ``gradient``; ``memory`` (empty at first) is moved on in place."""
    if not memory:
        memory.update(first=torch.zeros_like(gradient), second=torch.zeros_like(gradient), count=0)
    memory["count"] += 1
    first, second, t = memory["first"], memory["second"], memory["count"]
    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    root = (second.sqrt() / (1 - BETA2**t) ** 0.5).add_(EPS)
    return first / root.mul_(1 - BETA1**t)


def memory_of(federation: Federation, state: State, name: str) -> State | None:
    """Where a client's local optimizer keeps what it knows of the model ``name``; None for SGD. Empty at each call under reset."""
    if federation.optimizer != "adam":
        return None
    if federation.reset_optimizer:
        return {}
    memory: State = state.setdefault(f"adam_{name}", {})
    return memory


class Directed:
    """A problem whose minibatch gradients are turned into Adam's directions: any method of SGD steps then takes Adam's."""

    def __init__(self, problem: Problem, memory: State) -> None:
        self.problem, self.memory = problem, memory

    def gradient(self, point: Tensor, step: int) -> Tensor:
        return adam(self.problem.gradient(point, step), self.memory)

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.problem.full_gradient(point)

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        return self.problem.evaluate(point, split)


def descend(
    problem: Problem,
    start: Tensor,
    plan: Plan,
    memory: State | None,
    *,
    steps: int | None = None,
    keep: Tensor | None = None,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Where ``steps`` (P of the plan by default) local steps from ``start`` lead; a new vector.

    ``memory`` None is SGD. ``change(gradient, point)`` may alter the gradient before the optimizer sees it. ``keep`` is a
    mask (1 or 0 each element) of what may move.
    """
    y = start.clone()
    for p in range(plan.steps if steps is None else steps):
        gradient = problem.gradient(y, p)
        if change is not None:
            gradient = change(gradient, y)
        if keep is not None:
            gradient = gradient * keep
        direction = gradient if memory is None else adam(gradient, memory)
        if keep is not None and memory is not None:
            direction = direction * keep  # moments of another phase must not move what is frozen
        y.add_(direction, alpha=-plan.lr)
    return y
