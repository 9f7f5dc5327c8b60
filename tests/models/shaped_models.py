"""Building a model for a task that is nothing but a shape, and running its chain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from xutrain import registry
from xutrain.data.base import Task
from xutrain.models.chain import Chain


def build(name: str, shape: tuple[int, ...] = (3, 32, 32), classes: int = 10, **options: Any) -> Chain:
    cls = registry.load("model", name)
    task = cast(Task, SimpleNamespace(name="task", input_shape=shape, num_classes=classes))
    return cls.build(cls.Options(name=name, **options), task)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check_chain(net: Chain, shape: tuple[int, ...], classes: int = 10) -> None:
    """Layers compose to the forward pass, none changes its input, every parameter gets a gradient."""
    net.eval()
    x = torch.randn(2, *shape)
    y = x.clone()
    for layer in net.layers():
        kept = y.clone()
        out = layer(y)
        assert torch.equal(y, kept), f"{type(layer).__name__} changed its input"
        y = out
    assert y.shape == (2, classes) and torch.equal(net(x), y)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
