"""A model that is its parameter vector: what the quadratic test-bed is minimised over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.errors import Issue, RecipeError
from xutrain.registry import Named, model


class PointModule(nn.Module):
    """Returns w for every input row, shape (b, dim)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.w.expand(len(inputs), -1)


@model("point", summary="a bare parameter vector, for the data set quadratics", verbs=("federate",))
class Point:
    """Starts where the data set says, else at N(0, I)."""

    class Options(Named):
        name: str = "point"

    @staticmethod
    def build(options: Options, task: Task) -> PointModule:
        if len(task.input_shape) != 1:
            raise RecipeError(
                Issue("model.name", f"needs a vector, and samples here have shape {task.input_shape}", "point", "data: quadratics")
            )
        start = getattr(task, "start", None)
        return PointModule(torch.randn(task.input_shape[0]) if start is None else start)
