"""Fully connected networks: a multilayer perceptron and its limit without hidden layers, multinomial logistic regression."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain
from xutrain.registry import Named, model


@model("mlp", summary="multilayer perceptron with ReLU; inputs are flattened")
class Mlp:
    """Linear layers with ReLU between them; ``hidden: []`` is the linear model."""

    class Options(Named):
        name: str = "mlp"
        hidden: list[Annotated[int, Field(ge=1)]] = Field([64, 64], description="Widths of the hidden layers.")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a hidden value is dropped in training.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        widths = [math.prod(task.input_shape), *options.hidden]
        layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers += [(f"hidden{i}", nn.Linear(inputs, outputs)), (f"relu{i}", nn.ReLU())]
            if options.dropout:
                layers.append((f"dropout{i}", nn.Dropout(options.dropout)))
        layers.append(("classifier", nn.Linear(widths[-1], task.num_classes)))
        return Chain(OrderedDict(layers))


@model("linear", summary="multinomial logistic regression", aliases=("logistic",))
class Linear:
    """One linear layer; the loss is convex in its parameters."""

    class Options(Named):
        name: str = "linear"
        zero_init: bool = Field(False, description="Start from zero weights, as convex studies do.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        classifier = nn.Linear(math.prod(task.input_shape), task.num_classes)
        if options.zero_init:
            nn.init.zeros_(classifier.weight)
            nn.init.zeros_(classifier.bias)
        return Chain(OrderedDict([("flatten", nn.Flatten()), ("classifier", classifier)]))
