"""Residual networks with pre-activation (He et al., arXiv 1603.05027): batch norm and ReLU come before each convolution."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, fan_out_init, image_shape, option_issue
from xutrain.registry import Named, model


class PreBlock(nn.Module):
    """Batch norm, ReLU, convolution; twice 3x3 (basic) or 1x1, 3x3, 1x1 (bottleneck); plus the shortcut.

    Where the shape changes the shortcut is a 1x1 convolution of the activated input, else the input itself.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool, dropout: float = 0.0) -> None:
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        sizes = (1, 3, 1) if bottleneck else (3, 3)
        widths = [inputs, *(inner for _ in sizes[1:]), outputs]
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths[:-1])
        self.convs = nn.ModuleList(conv(widths[i], widths[i + 1], size, strides[i]) for i, size in enumerate(sizes))
        self.project = conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.norms[0](x))
        shortcut = x if self.project is None else self.project(y)
        y = self.convs[0](y)
        for norm, convolve in zip(self.norms[1:], self.convs[1:], strict=True):
            y = convolve(self.dropout(nn.functional.relu(norm(y))))
        return y + shortcut


def pre_activation_chain(task: Task, inputs: int, stem: int, widths: list[int], blocks: int, bottleneck: bool, dropout: float) -> Chain:
    """Stem convolution, three stages of ``blocks`` blocks, batch norm, ReLU, global average, classifier."""
    layers: list[tuple[str, nn.Module]] = [("conv", conv(inputs, stem, 3))]
    before = stem
    for s, after in enumerate(widths):
        stage = [PreBlock(before if i == 0 else after, after, 2 if s and i == 0 else 1, bottleneck, dropout) for i in range(blocks)]
        layers.append((f"stage{s + 1}", nn.Sequential(*stage)))
        before = after
    layers += [("bn", nn.BatchNorm2d(before)), ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    net = Chain(OrderedDict([*layers, ("classifier", nn.Linear(before, task.num_classes))]))
    fan_out_init(net)
    return net


@model("preresnet", paper="1603.05027", summary="pre-activation ResNet for 32x32 images (56, 110, 164)")
class PreResnet:
    """Basic blocks have depth 6n+2, bottlenecks 9n+2; ``auto`` takes basic blocks below depth 164."""

    class Options(Named):
        name: str = "preresnet"
        depth: int = Field(56, ge=8, description="Number of weighted layers: 6n+2 with basic blocks, 9n+2 with bottlenecks.")
        block: Literal["auto", "basic", "bottleneck"] = Field("auto", description="Kind of block; auto: bottleneck from depth 164 on.")
        width: int = Field(16, ge=1, description="Channels of the first stage's 3x3 convolutions; then twice and four times as many.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, _, _ = image_shape(task, "preresnet")
        bottleneck = options.block == "bottleneck" or (options.block == "auto" and options.depth >= 164)
        per_block = 9 if bottleneck else 6
        if (options.depth - 2) % per_block or options.depth < per_block + 2:
            kind = "bottleneck" if bottleneck else "basic"
            raise option_issue("depth", f"must be {per_block}n+2 with {kind} blocks", options.depth, "56 or 110 (basic), 164 (bottleneck)")
        blocks, grow = (options.depth - 2) // per_block, 4 if bottleneck else 1
        widths = [grow * options.width * m for m in (1, 2, 4)]
        return pre_activation_chain(task, inputs, options.width, widths, blocks, bottleneck, 0.0)
