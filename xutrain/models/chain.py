"""A network as a chain of layers, so that it can be cut anywhere into pipeline stages."""

from __future__ import annotations

import math

from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.errors import Issue, RecipeError


class Chain(nn.Sequential):
    """``nn.Sequential`` with named children; plain ``nn.Sequential`` children are groups (stages) of layers.

    No layer of a chain changes its input in place, so a stage may keep what it received.
    """

    def layers(self) -> list[nn.Module]:
        """The layers in order, groups opened: their composition is the forward pass."""
        flat: list[nn.Module] = []
        for child in self:
            flat += list(child) if type(child) is nn.Sequential else [child]
        return flat


class ZeroPadShortcut(nn.Module):
    """Option A of He et al. 2016 (CIFAR ResNets): subsample by ``stride`` and append zero channels; has no parameters."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.front, self.back, self.stride = more // 2, more - more // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, *, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the height and width (up to the stride)."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def norm(kind: str, channels: int, group: int) -> nn.Module:
    """What follows a convolution: batch norm, or group norm over ``group`` channels at a time, which knows no other samples.

    Raises:
        RecipeError: ``group`` does not divide ``channels``.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if channels % group:
        raise option_issue(
            "norm_group", f"does not divide a layer of {channels} channels", group, "a power of two up to the narrowest layer"
        )
    return nn.GroupNorm(channels // group, channels)


def fan_out_init(module: nn.Module) -> None:
    """Convolutions N(0, 2 / (k k c_out)) with bias 0, norms 1 and 0; linear layers keep torch's default."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / (part.kernel_size[0] * part.kernel_size[1] * part.out_channels)))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def image_shape(task: Task, model: str, *, smallest: int = 1) -> tuple[int, int, int]:
    """(channels, height, width) of the task's inputs.

    Raises:
        RecipeError: the inputs are no images, or smaller than ``smallest`` pixels.
    """
    shape = tuple(task.input_shape)
    if len(shape) != 3:
        raise RecipeError(Issue("model.name", f"takes images (channels, height, width), but {task.name} has inputs {shape}", model))
    if min(shape[1:]) < smallest:
        hint = "use larger images, or a model for small ones: mlp, cnn, resnet_cifar"
        raise RecipeError(Issue("model.name", f"needs images of at least {smallest}x{smallest}, {task.name} has {shape}", model, hint))
    return shape[0], shape[1], shape[2]


def option_issue(key: str, what: str, value: object, hint: str = "") -> RecipeError:
    """The error for a model option that no architecture can have."""
    return RecipeError(Issue(f"model.{key}", what, value, hint))
