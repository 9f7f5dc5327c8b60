"""VGG networks for 32x32 images (Simonyan & Zisserman, arXiv 1409.1556), with batch norm, as the error-feedback papers run them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, fan_out_init, image_shape, norm
from xutrain.registry import Named, model

#: Convolutions of the five stages; each stage ends with max-pooling by 2. Depth counts two hidden linear layers and the classifier.
STAGES = {
    11: [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    13: [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    16: [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    19: [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


@model("vgg", paper="1409.1556", summary="VGG-11/13/16/19 for 32x32 images, with batch norm by default", aliases=("vgg16", "vgg16_bn"))
class Vgg:
    """Depth 16 with ``classifier: [512, 512]`` (two dropouts) has 15,253,578 parameters for ten classes; with [] 14,728,266."""

    class Options(Named):
        name: str = "vgg"
        depth: Literal[11, 13, 16, 19] = Field(16, description="Number of weighted layers in the original counting.")
        batch_norm: bool = Field(True, description="A norm after every convolution.")
        norm: Literal["batch", "group"] = Field(
            "batch", description="Batch norm as published, or group norm, which knows no other samples."
        )
        norm_group: int = Field(16, ge=1, description="norm group: channels of a group; divides every layer's.")
        classifier: list[Annotated[int, Field(ge=1)]] = Field([512, 512], description="Widths of the hidden linear layers; [] for none.")
        dropout: float = Field(0.5, ge=0, lt=1, description="Probability of dropout before each hidden linear layer.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        before, height, width = image_shape(task, "vgg", smallest=32)
        layers: list[tuple[str, nn.Module]] = []
        for s, widths in enumerate(STAGES[options.depth], start=1):
            for i, after in enumerate(widths, start=1):
                layers.append((f"conv{s}_{i}", conv(before, after, 3, bias=True)))
                if options.batch_norm:
                    layers.append((f"bn{s}_{i}", norm(options.norm, after, options.norm_group)))
                layers.append((f"relu{s}_{i}", nn.ReLU()))
                before = after
            layers.append((f"pool{s}", nn.MaxPool2d(2)))
        layers.append(("flatten", nn.Flatten()))
        before *= (height >> 5) * (width >> 5)
        for i, after in enumerate(options.classifier, start=1):
            if options.dropout:
                layers.append((f"dropout{i}", nn.Dropout(options.dropout)))
            layers += [(f"hidden{i}", nn.Linear(before, after)), (f"relu{i}", nn.ReLU())]
            before = after
        layers.append(("classifier", nn.Linear(before, task.num_classes)))
        net = Chain(OrderedDict(layers))
        fan_out_init(net)
        return net
