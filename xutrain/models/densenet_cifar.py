"""DenseNet-BC for 32x32 images (Huang et al., arXiv 1608.06993): every layer adds ``growth`` channels to all that came before."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, image_shape
from xutrain.registry import Named, model


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 to 4 x growth, batch norm, ReLU, 3x3 to growth; the result is put before the input's channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.relu(self.bn1(x)))
        return torch.cat([self.conv2(nn.functional.relu(self.bn2(y))), x], 1)


class Transition(nn.Sequential):
    """Between two blocks: batch norm, ReLU, 1x1 to half the channels, mean over 2x2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, outputs, 1), nn.AvgPool2d(2))


@model("densenet_cifar", paper="1608.06993", summary="DenseNet-BC for 32x32 images, growth 12, 1.0 M parameters", aliases=("densenet",))
class DensenetCifar:
    """1,000,618 parameters for ten classes with the defaults; torch's default initialisation."""

    class Options(Named):
        name: str = "densenet_cifar"
        growth: int = Field(12, ge=1, description="Channels that each layer adds.")
        blocks: list[Annotated[int, Field(ge=1)]] = Field([6, 12, 24, 16], min_length=1, description="Layers in each dense block.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, _, _ = image_shape(task, "densenet_cifar", smallest=2 ** (len(options.blocks) - 1))
        channels = 2 * options.growth
        layers: list[tuple[str, nn.Module]] = [("conv", conv(inputs, channels, 3))]
        for b, count in enumerate(options.blocks, start=1):
            layers.append((f"block{b}", nn.Sequential(*(DenseLayer(channels + i * options.growth, options.growth) for i in range(count)))))
            channels += count * options.growth
            if b < len(options.blocks):
                layers.append((f"transition{b}", Transition(channels, channels // 2)))
                channels //= 2
        layers += [("bn", nn.BatchNorm2d(channels)), ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
        return Chain(OrderedDict([*layers, ("classifier", nn.Linear(channels, task.num_classes))]))
