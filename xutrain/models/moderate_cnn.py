"""ModerateCNN of Auto-FedRL's public code (after FedMA): a small VGG for 32x32 images without any norm layer."""

from __future__ import annotations

from collections import OrderedDict

from pydantic import Field
from torch import nn

from xutrain.data.base import Task
from xutrain.models.chain import Chain, conv, image_shape
from xutrain.registry import Named, model


@model("moderate_cnn", paper="2203.06338", summary="six convolutions and three linear layers without norm, 3.5 M parameters")
class ModerateCnn:
    """Convolutions 3x3 with bias and ReLU: 32, 64, pool; 128, 128, pool, channel dropout 0.05; 256, 256, pool; dropout 0.1,
    linear 4096 -> 512 -> 512, dropout 0.1, classifier. 3,491,530 parameters for 3x32x32 and ten classes. The paper calls it VGG-9."""

    class Options(Named):
        name: str = "moderate_cnn"
        channel_dropout: float = Field(0.05, ge=0, lt=1, description="Probability that a channel is dropped after the second pooling.")
        dropout: float = Field(0.1, ge=0, lt=1, description="Probability of dropout before the hidden layers and before the classifier.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        before, height, width = image_shape(task, "moderate_cnn", smallest=8)
        layers: list[tuple[str, nn.Module]] = []
        for stage, widths in enumerate(((32, 64), (128, 128), (256, 256)), start=1):
            for i, after in enumerate(widths, start=1):
                layers += [(f"conv{stage}_{i}", conv(before, after, 3, bias=True)), (f"relu{stage}_{i}", nn.ReLU())]
                before = after
            layers.append((f"pool{stage}", nn.MaxPool2d(2)))
            if stage == 2:
                layers.append(("channel_dropout", nn.Dropout2d(options.channel_dropout)))
        layers += [("flatten", nn.Flatten()), ("dropout1", nn.Dropout(options.dropout))]
        before *= (height >> 3) * (width >> 3)
        for i in (1, 2):
            layers += [(f"hidden{i}", nn.Linear(before, 512)), (f"hidden_relu{i}", nn.ReLU())]
            before = 512
        layers += [("dropout2", nn.Dropout(options.dropout)), ("classifier", nn.Linear(512, task.num_classes))]
        return Chain(OrderedDict(layers))
