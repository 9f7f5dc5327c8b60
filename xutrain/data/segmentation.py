"""Segmentation of images and volumes from several sites: masks of independent structures, Dice by MONAI's rules, who owns what.

What MONAI does well is MONAI's here: the Dice loss, the Dice metric, random crops of volumes. It is imported at first use.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Batch, Task
from xutrain.engine.rng import Key
from xutrain.registry import Named

#: added to numerator and denominator of the Dice loss (not of the metric)
SMOOTH = 1e-5


class SegmentationOptions(Named):
    """What every segmentation set understands."""

    loss: Literal["dice", "dice_ce"] = Field("dice", description="Dice on sigmoids, or its sum with pixelwise binary cross entropy.")
    augment: bool = Field(False, description="Random flips of every axis and, in 2-D, quarter turns of square images.")


@dataclass(frozen=True)
class Scans:
    """Samples of one split.

    Attributes:
        images: float32 of shape (n, C, H, W) or (n, C, D, H, W).
        masks: uint8 of shape (n, S, ...), one binary channel a structure.
        sites: int64 of shape (n,), indices into the task's site names.
        cases: the volume or the subject of each sample.
        spacings: millimetres between neighbouring pixels, float64 of shape (n, spatial axes), nan where not known; None of no sample known.
    """

    images: Tensor
    masks: Tensor
    sites: Tensor
    cases: tuple[str, ...]
    spacings: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.images.shape[0] == self.masks.shape[0] == len(self.sites) == len(self.cases)
        assert self.images.shape[2:] == self.masks.shape[2:]

    def __len__(self) -> int:
        return len(self.cases)

    @classmethod
    def join(cls, parts: list[Scans]) -> Scans:
        """All samples of ``parts``, in their order."""
        images, masks = _joined([p.images for p in parts]), _joined([p.masks for p in parts])
        known = [p.spacings for p in parts if p.spacings is not None]
        spacings = torch.cat(known) if len(known) == len(parts) else None
        return cls(images, masks, torch.cat([p.sites for p in parts]), tuple(case for p in parts for case in p.cases), spacings)

    def part(self, first: int, last: int) -> Scans:
        """Samples ``first`` to ``last`` (exclusive), in the same memory."""
        spacings = None if self.spacings is None else self.spacings[first:last]
        return Scans(self.images[first:last], self.masks[first:last], self.sites[first:last], self.cases[first:last], spacings)


def _joined(parts: list[Tensor]) -> Tensor:
    """``torch.cat``, without a copy where the parts lie one after the other in the same memory (mapped files)."""
    first, at = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.data_ptr() != at or not part.is_contiguous():
            return torch.cat(parts)
        at += part.numel() * part.element_size()
    return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())


class SegmentationTask(Task):
    """Sites, structures and scans. Logits have one channel a structure, each an independent sigmoid.

    ``num_train`` counts the source's own validation samples too; ``held_out`` marks them, and ``batches("train")`` leaves them out.

    Attributes:
        structures: names of the mask channels; ``num_classes`` is their number.
        site_names: names of the sites; ``sites`` and ``split_sites`` are indices into them.
        unseen_sites: sites of which only test samples exist.
        origin: what an error about the size of the samples should name besides it (a file and its site), or empty.
    """

    def __init__(
        self,
        name: str,
        splits: dict[str, Scans],
        structures: tuple[str, ...],
        site_names: tuple[str, ...],
        *,
        loss: Literal["dice", "dice_ce"] = "dice",
        augment: bool = False,
        patch: tuple[int, ...] | None = None,
        synthetic: bool = False,
        origin: str = "",
    ) -> None:
        train, val = splits["train"], splits.get("val")
        owned = val is not None and len(val) > 0
        self.name, self.synthetic, self.origin = name, synthetic, origin
        self.structures, self.site_names, self.num_classes = structures, site_names, len(structures)
        self.scans = Scans.join([train, val]) if owned and val is not None else train
        self.num_train, self.sites = len(self.scans), self.scans.sites
        self.held_out = torch.arange(self.num_train) >= len(train) if owned else None
        middle = len(train)
        self.splits = {"train": self.scans.part(0, middle), "val": self.scans.part(middle, self.num_train), "test": splits["test"]}
        shape = self.scans.images.shape[1:]
        self.input_shape = tuple(shape) if patch is None else (shape[0], *patch)
        self.patch, self.augment, self.kind = patch, augment, loss
        self.unseen_sites = tuple(sorted(set(self.splits["test"].sites.tolist()) - set(self.sites.tolist())))
        assert self.scans.masks.shape[1] == len(structures)

    def batch(self, indices: Tensor, key: Key) -> Batch:
        images, masks = self.scans.images[indices], self.scans.masks[indices]
        if self.patch is not None:
            images, masks = _crops(images, masks, self.patch, key.fold(stream="patch"))
        if self.augment:
            images, masks = _mirrored(images, masks, key.fold(stream="mirror"))
        return Batch(images, masks.float())

    def plain(self, indices: Tensor) -> Batch:
        return Batch(self.scans.images[indices], self.scans.masks[indices].float())

    def batches(self, split: str, batch_size: int = 500) -> Iterator[Batch]:
        part = self.splits[split]
        for at in range(0, len(part), batch_size):
            yield Batch(part.images[at : at + batch_size], part.masks[at : at + batch_size].float())

    @property
    def train_cases(self) -> tuple[str, ...]:
        """Volume or subject of every sample that clients may hold, validation samples included."""
        return self.scans.cases

    def split_sites(self, split: str) -> Tensor:
        """Site of every sample of ``split``, int64 of shape (n,), in the order of ``batches``."""
        return self.splits[split].sites

    def split_cases(self, split: str) -> list[str]:
        """Volume or subject of every sample of ``split``, in the order of ``batches``."""
        return list(self.splits[split].cases)

    def split_spacings(self, split: str) -> Tensor:
        """Millimetres between neighbouring pixels, float64 of shape (n, spatial axes), nan where they are not known."""
        part = self.splits[split]
        unknown = torch.full((len(part), part.images.ndim - 2), math.nan, dtype=torch.float64)
        return unknown if part.spacings is None else part.spacings

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss of every sample, shape (n,).

        Per structure 1 - (2 sum p y + 1e-5) / (sum p + sum y + 1e-5) with p = sigmoid(logits); the mean over structures.
        """
        value = _dice_loss()(outputs, batch.targets).flatten(1).mean(1)
        if self.kind == "dice_ce":
            entropy = nn.functional.binary_cross_entropy_with_logits(outputs, batch.targets, reduction="none")
            value = value + entropy.flatten(1).mean(1)
        return value

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.losses(outputs, batch).mean()

    def dice(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Dice of every sample and structure at threshold 0.5, shape (n, S), without smoothing; nan where the truth is empty."""
        from monai.metrics import compute_dice

        # compute_dice counts distinct mask values to recognise an empty truth, so it wants plain 0 and 1
        return compute_dice((outputs > 0).float(), batch.targets, ignore_empty=True)

    def counts(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Pixels of prediction and truth together, of the prediction, of the truth, shape (n, S, 3): they add up over a case."""
        found, truth = (outputs > 0).flatten(2), (batch.targets > 0).flatten(2)
        return torch.stack([(found & truth).sum(2), found.sum(2), truth.sum(2)], dim=2)

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """``loss``, ``dice`` (mean over the structures that a sample has) and, of several structures, ``dice_<structure>``."""
        table = self.dice(outputs, batch)
        each = table.nanmean(1)
        scores = {"loss": (float(self.losses(outputs, batch).detach().sum()), float(len(batch))), "dice": _known(each)}
        if len(self.structures) > 1:
            scores |= {f"dice_{name}": _known(table[:, i]) for i, name in enumerate(self.structures)}
        return scores


def _known(values: Tensor) -> tuple[float, float]:
    """Sum and number of the values that are not nan."""
    return float(values.nansum()), float((~values.isnan()).sum())


@functools.cache
def _dice_loss() -> Callable[[Tensor, Tensor], Tensor]:
    from monai.losses import DiceLoss

    return DiceLoss(sigmoid=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH, reduction="none")


def _mirrored(images: Tensor, masks: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Every spatial axis flipped with probability 1/2, then a quarter turn with probability 1/2 of square 2-D images."""
    axes = list(range(2, images.dim()))
    coins = key.uniform((len(axes) + 1) * len(images)).view(len(axes) + 1, -1) < 0.5
    for coin, axis in zip(coins, axes, strict=False):
        chosen = coin.view(-1, *(1,) * (images.dim() - 1))
        images, masks = torch.where(chosen, images.flip(axis), images), torch.where(chosen, masks.flip(axis), masks)
    if len(axes) == 2 and images.shape[2] == images.shape[3]:
        chosen = coins[-1].view(-1, 1, 1, 1)
        images, masks = torch.where(chosen, images.mT, images), torch.where(chosen, masks.mT, masks)
    return images, masks


def _crops(images: Tensor, masks: Tensor, patch: tuple[int, ...], key: Key) -> tuple[Tensor, Tensor]:
    """One window of size ``patch`` a sample, its centre in a structure or outside with equal chances."""
    from monai.transforms import RandCropByPosNegLabeld
    from monai.utils import convert_to_tensor

    crop = RandCropByPosNegLabeld(("image", "mask"), "mask", patch, pos=1, neg=1, num_samples=1, allow_smaller=False)
    pieces = []
    for i in range(len(images)):
        crop.set_random_state(int(key.fold(worker=i).words[0]))
        whole = masks[i].amax(0, keepdim=True)
        piece = crop({"image": images[i], "mask": torch.cat([whole, masks[i]])})[0]
        pieces.append((convert_to_tensor(piece["image"]), convert_to_tensor(piece["mask"])[1:]))  # without MONAI's metadata
    return torch.stack([p[0] for p in pieces]), torch.stack([p[1] for p in pieces])
