"""Wide residual networks (Zagoruyko & Komodakis, arXiv 1605.07146): pre-activation, depth 6n+4, k times as wide."""

from __future__ import annotations

from pydantic import Field

from xutrain.data.base import Task
from xutrain.models.chain import Chain, image_shape, option_issue
from xutrain.models.preresnet import pre_activation_chain
from xutrain.registry import Named, model


@model("wide_resnet", paper="1605.07146", summary="wide ResNet for 32x32 images (28-10 by default)", aliases=("wrn", "wideresnet"))
class WideResnet:
    """WRN-28-10 has 36,479,194 parameters for ten classes; widen 1 is a pre-activation ResNet with one projection more."""

    class Options(Named):
        name: str = "wide_resnet"
        depth: int = Field(28, ge=10, description="Number of weighted layers, 6n+4: 10, 16, 22, 28, 40, ...")
        widen: int = Field(10, ge=1, description="Factor k on the stage widths 16, 32, 64.")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropout between the two convolutions of a block.")

    @staticmethod
    def build(options: Options, task: Task) -> Chain:
        inputs, _, _ = image_shape(task, "wide_resnet")
        if (options.depth - 4) % 6:
            raise option_issue("depth", "must be 6n+4", options.depth, "one of 10, 16, 22, 28, 40")
        widths = [16 * options.widen * m for m in (1, 2, 4)]
        return pre_activation_chain(task, inputs, 16, widths, (options.depth - 4) // 6, False, options.dropout)
