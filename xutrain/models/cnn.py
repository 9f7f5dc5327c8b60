"""A small convolutional network, about 0.1 M parameters at 28x28: what trains in minutes on one CPU core."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from pydantic import Field
from torch import nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, image_shape, option_issue
from xutrain.registry import Named, model


@model("cnn", summary="small convolutional network without batch norm, for 8x8 to 64x64 images")
class Cnn:
    """For each width: convolution 3x3, ReLU, max-pool by 2; then one hidden layer and the classifier."""

    class Options(Named):
        name: str = "cnn"
        channels: list[Annotated[int, Field(ge=1)]] = Field([16, 32], min_length=1, description="Widths of the convolutions.")
        hidden: int = Field(64, ge=1, description="Width of the hidden layer before the classifier.")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a hidden value is dropped in training.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, height, width = image_shape(task, "cnn")
        depth = len(options.channels)
        if min(height, width) >> depth == 0:
            raise option_issue("channels", f"{depth} poolings leave nothing of a {height}x{width} image", options.channels, "fewer widths")
        layers: list[tuple[str, nn.Module]] = []
        for i, (a, b) in enumerate(zip([inputs, *options.channels], options.channels, strict=False), start=1):
            layers += [(f"conv{i}", conv(a, b, 3, bias=True)), (f"relu{i}", nn.ReLU()), (f"pool{i}", nn.MaxPool2d(2))]
        features = options.channels[-1] * (height >> depth) * (width >> depth)
        layers += [("flatten", nn.Flatten()), ("hidden", nn.Linear(features, options.hidden)), ("relu", nn.ReLU())]
        if options.dropout:
            layers.append(("dropout", nn.Dropout(options.dropout)))
        layers.append(("classifier", nn.Linear(options.hidden, task.num_classes)))
        return Chain(OrderedDict(layers))
