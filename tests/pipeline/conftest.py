"""Small pipelines: real digits, tiny networks, and a way to look at every gradient before it is applied."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.engine.context import Context
from xutrain.engine.pulse import Pulse
from xutrain.engine.record import Record
from xutrain.loops import pipelined
from xutrain.methods.pipeline.base import Stage
from xutrain.models.chain import Chain
from xutrain.recipe import load
from xutrain.registry import Named, model

CONFIGURATIONS = [([1, 0], [2, 0]), ([1, 1, 0], [4, 2, 0]), ([2, 2, 0], [6, 3, 0]), ([3, 3, 0], [10, 5, 0]), ([1, 1, 1, 0], [6, 4, 2, 0])]


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@model("test_net", summary="a small network for tests")
class TestNet:
    """Flatten, then width-16 blocks of linear, batch norm, activation, dropout."""

    __test__ = False

    class Options(Named):
        name: str = "test_net"
        depth: int = Field(4, ge=1)
        norm: bool = False
        dropout: float = 0.0
        double: bool = False
        tied: bool = False

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        layers: list[nn.Module] = [nn.Flatten(), *([Double()] if options.double else [])]
        width = 64
        for _ in range(options.depth):
            block: list[nn.Module] = [nn.Linear(width, 16), *([nn.BatchNorm1d(16)] if options.norm else []), nn.Tanh()]
            layers.append(Group(*block, *([nn.Dropout(options.dropout)] if options.dropout else [])))
            width = 16
        layers.append(nn.Linear(16, 10))
        net = Chain(*layers)
        if options.tied:
            net[-2][0].weight = net[-3][0].weight
        return net.double() if options.double else net


class Group(nn.Sequential):
    """One layer for the cut."""


def make(method: dict[str, Any] | str, **changes: Any) -> Any:
    """A recipe of a few batches of 20 digits; ``changes`` use ``__`` for dots."""
    raw: dict[str, Any] = {
        "data": {"name": "digits", "subset": 200, "test_subset": 50},
        "model": {"name": "test_net"},
        "stages": 3,
        "train": {"steps": 12, "batch_size": 20},
        "optimizer": {"lr": 0.1},
        "eval": {"every_epochs": None},
        "method": method,
    }
    return load.from_dict("pipeline", raw, overrides=[f"{k.replace('__', '.')}={v}" for k, v in changes.items()])


class Watched(pipelined.Pipeline):
    """Keeps, by (stage, batch), the gradients that are about to be applied and the weights they meet."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grads: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.weights: dict[tuple[int, int], dict[str, Tensor]] = {}

    def _update(self, stage: Stage, batch: int) -> None:
        self.grads[stage.index, batch] = {n: p.grad.clone() for n, p in stage.parameters.items() if p.grad is not None}
        self.weights[stage.index, batch] = {n: p.detach().clone() for n, p in stage.parameters.items()}
        super()._update(stage, batch)


_FOLDERS = itertools.count()


def watch(recipe: Any, folder: Path) -> Watched:
    """Train a recipe in this process and its peers; returns the finished pipeline."""
    ctx = Context.open(recipe.seed)
    folder = folder / f"run{next(_FOLDERS)}" if not (folder / "STAY").exists() else folder
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder, ctx.meter, is_main=ctx.is_main)
    with Pulse(folder, ctx.rank, ctx.processes, recipe.stages // ctx.processes) as pulse:
        pipeline = Watched(recipe, ctx, record, pulse)
        pipeline.metrics = pipeline.train()  # type: ignore[attr-defined]
    record.close()
    return pipeline


@pytest.fixture
def recipe() -> Callable[..., Any]:
    return make


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[Any], Watched]:
    """``trained(recipe)``: the finished pipeline, all stages in this process."""
    return lambda chosen: watch(chosen, tmp_path)


def same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    """Bit-equal nested dicts of tensors."""
    if a.keys() != b.keys():
        return False
    return all(same(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing costs more than these trainings; test_ledger draws."""
    from xutrain.loops import pipeline_ledger

    monkeypatch.setattr(pipeline_ledger, "draw", lambda *args: None)
