"""Nets that tell from an image which site it comes from: FedSM's VGG-11, and a small one of ours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from xutrain.errors import Issue, RecipeError

Kind = Literal["vgg11", "small"]


def build_selector(kind: Kind, channels: int, spatial_dims: int, outputs: int) -> nn.Module:
    """A net from images (n, channels, H, W) to logits (n, outputs). Volumes are judged by their axial slices: see ``vote``.

    Args:
        kind: "vgg11", 128,777,475 numbers for 1 channel and 3 outputs (FedSM's); "small", 0.1 M numbers, ours.
        spatial_dims: 2, or 3 for data of volumes (the net is 2-D all the same).
        outputs: number of sites.
    """
    assert spatial_dims in (2, 3), spatial_dims
    return _vgg11(channels, outputs) if kind == "vgg11" else Small(channels, outputs)


def _vgg11(channels: int, outputs: int) -> nn.Module:
    """VGG-11 without batch norm: He fan-out initialisation of convolutions, N(0, 0.01) of linear layers, dropout 0.5."""
    from torchvision.models import vgg11

    net: nn.Module = vgg11(num_classes=outputs)
    if channels != 3:
        first = nn.Conv2d(channels, 64, 3, padding=1)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(first.bias)  # type: ignore[arg-type]
        net.features[0] = first  # type: ignore[index, operator, assignment]
    return net


class Small(nn.Module):
    """Four strided convolutions; mean and deviation over the image of every channel at every level, then one linear layer.

    Sites differ in contrast, noise and shading, which such statistics hold and which norm layers would remove: so there are none.
    Any size of image from 16 pixels up.
    """

    def __init__(self, channels: int, outputs: int, widths: tuple[int, ...] = (16, 32, 64, 160)) -> None:
        super().__init__()
        sizes = (channels, *widths)
        self.levels = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, widths, strict=False))
        for conv in self.levels:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type]
        self.classifier = nn.Linear(2 * sum(sizes), outputs)

    def forward(self, images: Tensor) -> Tensor:
        found = [_statistics(images)]
        for conv in self.levels:
            images = torch.relu(conv(images))
            found.append(_statistics(images))
        logits: Tensor = self.classifier(torch.cat(found, 1))
        return logits


def _statistics(maps: Tensor) -> Tensor:
    """Mean and standard deviation over the image, shape (n, 2 channels)."""
    variance, mean = torch.var_mean(maps.flatten(2), dim=2, correction=0)
    return torch.cat([mean, (variance + 1e-5).sqrt()], 1)


def slices_of(volumes: Tensor, key_slices: Tensor | None = None) -> Tensor:
    """Axial slices (m, C, H, W) of volumes (n, C, D, H, W), volume by volume; ``key_slices`` (int64, (k,)) takes some of the D only.

    Images (n, C, H, W) are returned as they are.
    """
    if volumes.dim() == 4:
        return volumes
    if key_slices is not None:
        volumes = volumes[:, :, key_slices]
    return volumes.movedim(2, 1).flatten(0, 1)


def vote(selector: nn.Module, inputs: Tensor) -> Tensor:
    """Probabilities of the sites, shape (n, outputs): softmax for images; for volumes its mean over all axial slices."""
    probabilities = torch.softmax(selector(slices_of(inputs)).float(), 1)
    return probabilities if inputs.dim() == 4 else probabilities.view(len(inputs), -1, probabilities.shape[1]).mean(1)


def check_selector(kind: Kind, sides: tuple[int, ...]) -> None:
    """Refuse images that are too small. Raises RecipeError."""
    least = 32 if kind == "vgg11" else 16
    if min(sides[-2:]) < least:
        hint = "take larger images, or the small selector" if kind == "vgg11" else "take larger images"
        raise RecipeError(Issue("data.size", f"the {kind} selector needs images of at least {least} pixels a side", list(sides), hint))
