"""Small problems in float64 on which the methods of `pretrain` are driven step by step, without the loop."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.replica import Slice
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.exchange import Exchange
from xutrain.recipe import resolve
from xutrain.recipe.pretrain import PretrainOptimizer

DIM = 23  # two tensors: a matrix of 3 x 5 and a vector of 8
LAYOUT = [Slice("matrix", (3, 5), 0, 15), Slice("vector", (8,), 15, 23)]
Gradient = Callable[[int, int, Tensor], Tensor]


def build(
    name: str,
    options: dict[str, Any],
    *,
    workers: int = 4,
    optimizer: dict[str, Any] | None = None,
    steps: int = 24,
    reduction: Any = "ring",
    codec: str = "fp",
    codec_options: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    start: Tensor | None = None,
    clip_norm: float | None = None,
) -> DataParallel:
    """A method at ``start`` (keyed random numbers by default). The ring adds what it is given, float64 included."""
    ctx = Context.open(seed=5)
    team = ctx.workers(workers, reduction)
    codec_class, chosen = resolve.options("codec", codec, dict(codec_options or {}))
    exchange = Exchange(team, codec_class(chosen, workers), ctx.meter)
    theta = torch.randn(DIM, generator=ctx.key("start").generator(), dtype=torch.float64).to(dtype) if start is None else start.to(dtype)
    part, made = resolve.options("method", name, dict(options), verb="pretrain")
    base = PretrainOptimizer(**({"name": "sgd", "weight_decay": 0.0} | (optimizer or {})))
    recipe = SimpleNamespace(train=SimpleNamespace(clip_norm=clip_norm))
    setup = Setup(theta, LAYOUT, team, exchange, base, ctx, steps, recipe)  # type: ignore[arg-type]
    method: DataParallel = part(made, setup)
    return method


def gradient(step: int, worker: int, x: Tensor) -> Tensor:
    """Of a quadratic with curvatures 0.5 .. 2 and a noisy centre: different on every worker and at every step."""
    noise = torch.randn(DIM, generator=registry_key(step, worker), dtype=torch.float64).to(x.dtype)
    return torch.linspace(0.5, 2.0, DIM, dtype=x.dtype) * (x - 0.3 * worker) + noise


def registry_key(step: int, worker: int) -> torch.Generator:
    from xutrain.engine.rng import Key

    return Key(7, "gradient", step, worker).generator()


def drive(method: DataParallel, rates: list[float], first: int = 0, of: Gradient = gradient) -> Tensor:
    """Take one step per rate from step ``first`` on; returns the global model."""
    for step, lr in enumerate(rates, start=first):
        hosted = method.setup.workers.hosted
        method.step([of(step, w, method.point(w)) for w in hosted], lr, step)
    return method.deploy()["x"]
