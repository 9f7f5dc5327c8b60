"""Residual networks for small images (He et al., arXiv 1512.03385, section 4.2): depth 6n+2, three stages of n basic blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, ZeroPadShortcut, conv, fan_out_init, image_shape, norm, option_issue
from xutrain.registry import Named, model


class BasicBlock(nn.Module):
    """conv 3x3, norm, ReLU, conv 3x3, norm, plus the shortcut, ReLU; ``norm`` makes a norm of so many channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), norm(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                ZeroPadShortcut(outputs - inputs, stride)
                if shortcut == "A"
                else nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@model("resnet_cifar", paper="1512.03385", summary="ResNet of depth 6n+2 for 32x32 images (20, 32, 44, 56, 110)", aliases=("resnet",))
class ResnetCifar:
    """Depth 20 at width 16 has 269,722 parameters for ten classes, depth 56 has 853,018, depth 110 has 1,727,962 (option A)."""

    class Options(Named):
        name: str = "resnet_cifar"
        depth: int = Field(20, ge=8, description="Number of weighted layers, 6n+2: 8, 14, 20, 32, 44, 56, 98, 110, 164, ...")
        width: int = Field(16, ge=1, description="Channels of the first stage; the next ones have twice and four times as many.")
        shortcut: Literal["A", "B"] = Field("A", description="Where the shape changes: A pads with zeros, B projects by 1x1.")
        norm: Literal["batch", "group"] = Field(
            "batch", description="Batch norm as published, or group norm, which knows no other samples."
        )
        norm_group: int = Field(8, ge=1, description="norm group: channels of a group; divides every layer's.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, _, _ = image_shape(task, "resnet_cifar")
        if (options.depth - 2) % 6:
            raise option_issue("depth", "must be 6n+2", options.depth, "one of 8, 14, 20, 32, 44, 56, 98, 110, 164")
        n, w = (options.depth - 2) // 6, options.width
        between = partial(norm, options.norm, group=options.norm_group)
        layers: list[tuple[str, nn.Module]] = [("conv", conv(inputs, w, 3)), ("bn", between(w)), ("relu", nn.ReLU())]
        before = w
        for s, after in enumerate((w, 2 * w, 4 * w)):
            shapes = [(before if i == 0 else after, after, 2 if s and i == 0 else 1) for i in range(n)]
            stage = [BasicBlock(*shape, options.shortcut, between) for shape in shapes]
            layers.append((f"stage{s + 1}", nn.Sequential(*stage)))
            before = after
        layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classifier", nn.Linear(4 * w, task.num_classes))]
        net = Chain(OrderedDict(layers))
        fan_out_init(net)
        return net
