"""Base optimizers on flat vectors are torch's, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from xutrain.engine.base_optimizers import base_optimizer, decayed
from xutrain.engine.replica import Slice
from xutrain.recipe.pretrain import PretrainOptimizer

LAYOUT = [Slice("a", (3, 4), 0, 12), Slice("b", (5,), 12, 17), Slice("c", (2, 2), 17, 21), Slice("d", (1, 3), 21, 24)]


def parameters(theta: torch.Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(theta[p.start : p.stop].view(p.shape).clone()) for p in LAYOUT]


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"name": "adamw", "weight_decay": 0.1}, lambda g: torch.optim.AdamW(g, lr=0.1, betas=(0.9, 0.95), foreach=False)),
        (
            {"name": "sgd", "weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
            lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
        ),
        ({"name": "torch", "torch_class": "NAdam", "weight_decay": 0.1}, lambda g: torch.optim.NAdam(g, lr=0.1)),
    ],
    ids=["adamw", "sgd", "torch"],
)
def test_flat_is_torch(options: dict[str, Any], make: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    theta = torch.randn(24, generator=generator)
    own = parameters(theta)
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in own if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch_optimizer = make(groups)
    flat = base_optimizer(PretrainOptimizer(**options), LAYOUT)
    for step in range(6):
        lr = 0.1 / (1 + step)
        grad = torch.randn(24, generator=generator)
        for p, part in zip(own, LAYOUT, strict=True):
            p.grad = grad[part.start : part.stop].view(part.shape).clone()
        for group in torch_optimizer.param_groups:
            group["lr"] = lr
        torch_optimizer.step()
        flat.step(theta, grad.clone(), lr)
        if step == 3:  # through a checkpoint
            state, flat = flat.state(), base_optimizer(PretrainOptimizer(**options), LAYOUT)
            flat.load_state(state)
        assert torch.equal(theta, torch.cat([p.detach().reshape(-1) for p in own])), step


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop"])
def test_state_of_torch_is_of_the_workers_kind(name: str) -> None:
    """A vector in float64: the state is too, from the start and after a resume."""
    options = PretrainOptimizer(name="torch", torch_class=name, weight_decay=0.0)
    generator = torch.Generator().manual_seed(4)
    theta = torch.randn(24, generator=generator, dtype=torch.float64)
    other = theta.clone()
    straight, resumed = (base_optimizer(options, LAYOUT, theta) for _ in range(2))
    for _ in range(4):
        grad = torch.randn(24, generator=generator, dtype=torch.float64)
        straight.step(theta, grad.clone(), 0.1)
        resumed.step(other, grad.clone(), 0.1)
        state, resumed = resumed.state(), base_optimizer(options, LAYOUT, other)
        resumed.load_state(state)
        assert {v.dtype for s in straight.state()["state"].values() for v in s.values() if v.numel() > 1} == {torch.float64}
        assert torch.equal(theta, other)


def test_state_of_torch_is_on_the_workers_device() -> None:
    """The device without numbers stands for a GPU: Adagrad's sums are there before the first step."""
    options = PretrainOptimizer(name="torch", torch_class="Adagrad", weight_decay=0.0)
    state = base_optimizer(options, LAYOUT, torch.zeros(24, device="meta")).state()["state"]
    assert {s["sum"].device.type for s in state.values()} == {"meta"}


def test_what_decays() -> None:
    assert decayed(LAYOUT, "matrices") == [(0, 12), (17, 24)]
    assert decayed(LAYOUT, "all") == [(0, 24)]
