"""MONAI's U-Net, 2-D and 3-D: strided residual units down, transposed convolutions up, PReLU, instance norm without parameters."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.errors import Issue, RecipeError
from xutrain.models.chain import option_issue
from xutrain.registry import Named, model

Width = Annotated[int, Field(ge=1)]


@model("unet", summary="MONAI's residual U-Net for segmentation, 2-D and 3-D")
class UNet:
    """Defaults are the net of FedSM's prostate experiment: 16-32-64-128-256, strides 2, 2 residual units, 1,624,844 numbers for
    one channel in and one out. Source: Kerfoot et al. 2018 as in monai.networks.nets.UNet."""

    class Options(Named):
        name: str = "unet"
        channels: list[Width] = Field([16, 32, 64, 128, 256], min_length=2, description="Widths from the top level to the bottom.")
        strides: list[Width] = Field(
            [2, 2, 2, 2], min_length=1, description="Downsampling between neighbouring levels: one less than widths."
        )
        res_units: int = Field(2, ge=0, description="Residual units in every block; 0 takes plain convolutions.")
        norm: Literal["instance", "batch"] = Field("instance", description="Instance norm (no parameters) or batch norm (with statistics).")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a value is dropped in training.")
        window: list[Width] | None = Field(
            None, description="Evaluate by MONAI's sliding window of this size, overlap 1/4; null takes samples whole."
        )

    @staticmethod
    def build(options: Options, task: Task) -> nn.Module:
        from monai.networks.nets import UNet as Net

        dims = len(task.input_shape) - 1
        if not hasattr(task, "structures"):
            raise RecipeError(Issue("model.name", f"unet segments, and {task.name} has no masks", "unet", "choose a medical_* data set"))
        if len(options.strides) != len(options.channels) - 1:
            what = f"must be one fewer than the {len(options.channels)} widths of model.channels"
            raise option_issue("strides", what, options.strides, f"{len(options.channels) - 1} numbers")
        factor = math.prod(options.strides)
        check_size(task, task.input_shape[1:], factor, "patch" if getattr(task, "patch", None) else "size")
        scans = getattr(task, "scans", None)
        if options.window is None and scans is not None:
            check_size(task, tuple(scans.images.shape[2:]), factor, "size")  # evaluation takes samples whole
        if options.window is not None:
            if len(options.window) != dims:
                raise option_issue("window", f"must have {dims} numbers for this data set", options.window, "depth, height, width in 3-D")
            if any(side % factor for side in options.window):
                raise option_issue("window", f"must be multiples of {factor}, the product of model.strides", options.window, "")
        net = Net(
            dims,
            task.input_shape[0],
            task.num_classes,
            options.channels,
            options.strides,
            num_res_units=options.res_units,
            norm=options.norm,
            dropout=options.dropout,
        )
        return net if options.window is None else Windowed(net, tuple(options.window))


def check_size(task: Task, sides: tuple[int, ...], factor: int, key: str) -> None:
    """Refuse sides that ``factor`` does not divide. Raises RecipeError naming the key and, where the size is a file's own, the file."""
    if not any(side % factor for side in sides) and math.prod(side // factor for side in sides) > 1:
        return  # a norm layer needs more than one element at the bottom
    origin = getattr(task, "origin", "")
    what = f"the U-Net needs sides that are multiples of {factor}, the product of model.strides, and at least one larger" + (
        f"; {origin}" if origin else ""
    )
    near = [max(2 * factor if i else factor, factor * round(side / factor)) for i, side in enumerate(sides)]
    raise RecipeError(
        Issue(f"data.{key}", what, list(sides), f"for example {near}, fewer or smaller model.strides, or (data.patch) model.window")
    )


class Windowed(nn.Module):
    """A net that, in evaluation, predicts inputs of another size than ``window`` piece by piece, smaller ones padded to it."""

    def __init__(self, net: nn.Module, window: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.window = net, window

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training or tuple(inputs.shape[2:]) == self.window:
            out: Tensor = self.net(inputs)
            return out
        from monai.inferers import sliding_window_inference

        with torch.no_grad():
            whole: Any = sliding_window_inference(inputs, self.window, 4, self.net, overlap=0.25)
        result: Tensor = whole
        return result
