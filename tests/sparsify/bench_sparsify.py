"""A small float64 problem on which methods are driven without the loop, and references that share no code with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import xutrain
from xutrain.engine.context import Context
from xutrain.engine.meter import BitMeter
from xutrain.engine.replica import Slice
from xutrain.engine.workers import Workers
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.exchange import Exchange
from xutrain.recipe.resolve import options
from xutrain.recipe.schema import Optimizer

SHAPES = [(6, 5), (6,), (4, 6), (4,)]
LAYOUT: list[Slice] = []
for _i, _shape in enumerate(SHAPES):
    _at = LAYOUT[-1].stop if LAYOUT else 0
    LAYOUT.append(Slice(f"t{_i}", _shape, _at, _at + torch.Size(_shape).numel()))
D = LAYOUT[-1].stop
TOLERANCE = 1e-10


class Problem:
    """f_k(w) = mean over components of log cosh (A_k w - b_k) / 1, with a different minibatch scale every step."""

    def __init__(self, workers: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.a = [torch.randn(D, D, generator=g, dtype=torch.float64) / D**0.5 for _ in range(workers)]
        self.b = [torch.randn(D, generator=g, dtype=torch.float64) for _ in range(workers)]
        self.noise = torch.randn(200, workers, D, generator=g, dtype=torch.float64) * 0.1
        self.theta = torch.randn(D, generator=g, dtype=torch.float64)

    def grad(self, worker: int, step: int, at: Tensor) -> Tensor:
        residual = self.a[worker] @ at - self.b[worker]
        return self.a[worker].t() @ torch.tanh(residual) + self.noise[step, worker]


def make(
    name: str,
    codec: str = "fp",
    workers: int = 4,
    problem: Problem | None = None,
    *,
    optimizer: dict[str, Any] | None = None,
    **kwargs: Any,
) -> DataParallel:
    """A method on float64 vectors: ``codec_`` prefixed words are the codec's options, ``mode`` the exchange's."""
    chosen = {k[6:]: v for k, v in kwargs.items() if k.startswith("codec_")}
    mode = kwargs.pop("mode", "allgather")
    own = {k: v for k, v in kwargs.items() if not k.startswith("codec_")}
    group = Workers(workers)
    built = xutrain.codec(codec, workers=workers, **chosen)
    built.lay(LAYOUT)
    exchange = Exchange(group, built, BitMeter(), mode)
    cls, opts = options("method", name, own, "sparsify")
    start = (problem or Problem(workers)).theta
    setup = Setup(
        start.clone(), LAYOUT, group, exchange, Optimizer(**(optimizer or {"momentum": 0.9, "weight_decay": 1e-2})), Context(7), 100, None
    )
    return cls(opts, setup)


def drive(
    method: Any,
    problem: Problem,
    steps: int,
    lr: float | Callable[[int], float] = 0.05,
    each: Callable[[int, list[Tensor]], None] | None = None,
    first: int = 0,
) -> None:
    """``steps`` steps; ``each(step, points)`` sees where the gradients were taken, before the step."""
    for step in range(first, first + steps):
        points = [method.point(w).clone() for w in method.setup.workers.hosted]
        if each:
            each(step, points)
        method.step([problem.grad(w, step, p) for w, p in enumerate(points)], lr(step) if callable(lr) else lr, step)


def sgd(problem: Problem, workers: int, steps: int, lr: float = 0.05, mu: float = 0.9, wd: float = 1e-2) -> list[Tensor]:
    """Momentum SGD on the workers' mean gradient: x_0 .. x_steps."""
    x, m, path = problem.theta.clone(), torch.zeros(D, dtype=torch.float64), [problem.theta.clone()]
    for step in range(steps):
        g = sum(problem.grad(w, step, x) for w in range(workers)) / workers + wd * x
        m = mu * m + g
        x = x - lr * m
        path.append(x.clone())
    return path
