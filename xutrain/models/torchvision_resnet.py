"""torchvision's ResNets, for ImageNet; opened into a chain with torchvision's parameter names, so its checkpoints fit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from pydantic import Field
from torch import nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, image_shape
from xutrain.registry import Named, model


@model("torchvision_resnet", paper="1512.03385", summary="ResNet-18/34/50/101/152 of torchvision, random initial weights")
class TorchvisionResnet:
    """ResNet-50 has 25,557,032 parameters for 1,000 classes; ResNet-18 11,689,512."""

    class Options(Named):
        name: str = "torchvision_resnet"
        depth: Literal[18, 34, 50, 101, 152] = Field(50, description="Number of weighted layers.")
        stem: Literal["imagenet", "small"] = Field(
            "imagenet", description="imagenet: 7x7 stride 2 and max-pooling; small: 3x3 stride 1 without pooling, for 32x32 images."
        )
        zero_init_residual: bool = Field(False, description="Start each block's last batch norm at zero.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        from torchvision import models

        inputs, _, _ = image_shape(task, "torchvision_resnet")
        make = getattr(models, f"resnet{options.depth}")
        net = make(weights=None, num_classes=task.num_classes, zero_init_residual=options.zero_init_residual)
        parts = OrderedDict(net.named_children())
        parts["relu"] = nn.ReLU()  # torchvision's works in place; a stage may begin here
        if options.stem == "small":
            parts["conv1"] = conv(inputs, 64, 3)
            parts["maxpool"] = nn.Identity()
        elif inputs != 3:
            parts["conv1"] = nn.Conv2d(inputs, 64, 7, 2, 3, bias=False)
        if parts["conv1"] is not net.conv1:
            nn.init.kaiming_normal_(parts["conv1"].weight, mode="fan_out", nonlinearity="relu")
        head = parts.pop("fc")
        return Chain(OrderedDict([*parts.items(), ("flatten", nn.Flatten()), ("fc", head)]))
