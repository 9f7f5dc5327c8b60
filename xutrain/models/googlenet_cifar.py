"""GoogLeNet for 32x32 images: the nine inception modules of Szegedy et al. (arXiv 1409.4842), with batch norm.

As in the CIFAR versions that the papers' code uses: one 3x3 stem, and two 3x3 convolutions in place of each 5x5.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, image_shape
from xutrain.registry import Named, model

#: Per module: 1x1 | 1x1 then 3x3 | 1x1 then two 3x3 | pooling then 1x1. "pool" halves the height and width.
MODULES: list[tuple[str, tuple[int, int, int, int, int, int] | None]] = [
    ("3a", (64, 96, 128, 16, 32, 32)),
    ("3b", (128, 128, 192, 32, 96, 64)),
    ("pool3", None),
    ("4a", (192, 96, 208, 16, 48, 64)),
    ("4b", (160, 112, 224, 24, 64, 64)),
    ("4c", (128, 128, 256, 24, 64, 64)),
    ("4d", (112, 144, 288, 32, 64, 64)),
    ("4e", (256, 160, 320, 32, 128, 128)),
    ("pool4", None),
    ("5a", (256, 160, 320, 32, 128, 128)),
    ("5b", (384, 192, 384, 48, 128, 128)),
]


def _step(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    return [conv(inputs, outputs, size, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()]


class Inception(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, inputs: int, one: int, to3: int, three: int, to5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.one = nn.Sequential(*_step(inputs, one, 1))
        self.three = nn.Sequential(*_step(inputs, to3, 1), *_step(to3, three, 3))
        self.five = nn.Sequential(*_step(inputs, to5, 1), *_step(to5, five, 3), *_step(five, five, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_step(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


@model("googlenet_cifar", paper="1409.4842", summary="GoogLeNet for 32x32 images, 6.2 M parameters", aliases=("googlenet",))
class GooglenetCifar:
    """6,166,250 parameters for ten classes; torch's default initialisation."""

    class Options(Named):
        name: str = "googlenet_cifar"

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, _, _ = image_shape(task, "googlenet_cifar")
        stem, before = _step(inputs, 192, 3), 192
        layers: list[tuple[str, nn.Module]] = [("conv", stem[0]), ("bn", stem[1]), ("relu", stem[2])]
        for name, widths in MODULES:
            if widths is None:
                layers.append((name, nn.MaxPool2d(3, 2, 1)))
                continue
            layers.append((f"inception{name}", Inception(before, *widths)))
            before = widths[0] + widths[2] + widths[4] + widths[5]
        layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classifier", nn.Linear(before, task.num_classes))]
        return Chain(OrderedDict(layers))
