"""ResNeXt for 32x32 images (Xie et al., arXiv 1611.05431, section 5.3): bottlenecks whose 3x3 convolution has groups."""

from __future__ import annotations

from collections import OrderedDict

from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, fan_out_init, image_shape, option_issue
from xutrain.registry import Named, model


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1, each with batch norm; plus the shortcut (1x1 where the shape changes), ReLU."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups=groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.bn1(self.conv1(x)))
        y = nn.functional.relu(self.bn2(self.conv2(y)))
        return nn.functional.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


@model("resnext_cifar", paper="1611.05431", summary="ResNeXt-29 for 32x32 images (8x64d by default)", aliases=("resnext",))
class ResnextCifar:
    """ResNeXt-29, 8x64d: 34.4 M parameters. Stage widths 256, 512, 1024 as in the paper."""

    class Options(Named):
        name: str = "resnext_cifar"
        depth: int = Field(29, ge=11, description="Number of weighted layers, 9n+2.")
        cardinality: int = Field(8, ge=1, description="Groups of the 3x3 convolutions.")
        base_width: int = Field(64, ge=1, description="Channels of a group in the first stage; then twice and four times as many.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, _, _ = image_shape(task, "resnext_cifar")
        if (options.depth - 2) % 9:
            raise option_issue("depth", "must be 9n+2", options.depth, "one of 11, 20, 29, 38")
        blocks, groups, before = (options.depth - 2) // 9, options.cardinality, 64
        layers: list[tuple[str, nn.Module]] = [("conv", conv(inputs, 64, 3)), ("bn", nn.BatchNorm2d(64)), ("relu", nn.ReLU())]
        for s, m in enumerate((1, 2, 4)):
            inner, after = groups * options.base_width * m, 256 * m
            stage = [GroupedBottleneck(before if i == 0 else after, inner, after, 2 if s and i == 0 else 1, groups) for i in range(blocks)]
            layers.append((f"stage{s + 1}", nn.Sequential(*stage)))
            before = after
        layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classifier", nn.Linear(before, task.num_classes))]
        net = Chain(OrderedDict(layers))
        fan_out_init(net)
        return net
