"""Metrics of a split, the same for any number of processes."""

from __future__ import annotations

import torch
from torch import nn

from xutrain.data.base import Task
from xutrain.engine.context import Context
from xutrain.engine.workers import Workers


def evaluate(module: nn.Module, task: Task, split: str, ctx: Context, batch_size: int = 500) -> dict[str, float]:
    """Mean metrics of ``split`` ("loss", "accuracy", ...), module in evaluation mode.

    Batch i is computed by process i mod P; the sums are added in batch order, so the result does not depend on P.
    """
    was_training = module.training
    module.eval()
    mine: list[tuple[int, dict[str, tuple[float, float]]]] = []
    with torch.no_grad():
        for i, batch in enumerate(task.batches(split, batch_size)):
            if i % ctx.processes == ctx.rank:
                placed = batch.to(ctx.device)
                mine.append((i, task.score(module(placed.inputs), placed)))
    module.train(was_training)
    everyone = Workers(ctx.processes, ctx.rank, ctx.processes).objects([mine])
    sums: dict[str, tuple[float, float]] = {}
    for _, scores in sorted((item for block in everyone for item in block), key=lambda item: item[0]):
        for name, (value, weight) in scores.items():
            total, weights = sums.get(name, (0.0, 0.0))
            sums[name] = (total + value, weights + weight)
    return {name: total / weight if weight else float("nan") for name, (total, weight) in sums.items()}
