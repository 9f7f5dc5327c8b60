"""Image classification from arrays in memory: uint8 pixels, one table look-up per batch for crop, flip and scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xutrain.data.base import Batch, Task
from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.registry import Named


class ImageOptions(Named):
    """What every image set in memory understands."""

    val_fraction: float = Field(0.0, ge=0, lt=1, description="Part of the training samples that is set aside as split val.")
    subset: int | None = Field(None, ge=1, description="Use only this many training samples, drawn once for all seeds; null uses all.")
    test_subset: int | None = Field(None, ge=1, description="Evaluate on this many test samples, drawn once for all seeds; null uses all.")
    data_seed: int = Field(0, description="Seed of splits and subsets (or of generated samples); the run's seed does not change them.")


@dataclass(frozen=True)
class Pixels:
    """Images uint8 of shape (n, channels, height, width) and labels int64 of shape (n,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, rows: np.ndarray | None = None) -> Pixels:
        """From arrays, possibly memory-mapped; only ``rows`` are read when given."""
        picked = (images, labels) if rows is None else (images[rows], labels[rows])
        return cls(torch.from_numpy(np.array(picked[0], dtype=np.uint8)), torch.from_numpy(np.array(picked[1], dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.labels)


class ImageTask(Task):
    """Classification of images held as uint8.

    A training batch is: gather, zero-pad by ``pad`` and crop back, mirror with probability 1/2, divide by ``peak``,
    subtract ``mean``, divide by ``std`` (per channel). Padding is black, as it comes before the normalisation. Crop offsets
    and mirrors are functions of the batch's key alone.
    """

    def __init__(
        self,
        name: str,
        splits: dict[str, Pixels],
        num_classes: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        peak: float = 255.0,
        pad: int = 0,
        flip: bool = False,
        synthetic: bool = False,
    ) -> None:
        train = splits["train"]
        self.name, self.num_classes, self.synthetic = name, num_classes, synthetic
        self.splits = {"val": Pixels(train.images[:0], train.labels[:0]), **splits}
        self.input_shape = tuple(train.images.shape[1:])
        self.num_train = len(train)
        self.labels = train.labels
        self.pad, self.flip = pad, flip
        assert len(mean) == len(std) == self.input_shape[0]
        self._scale = (1.0 / (peak * torch.tensor(std, dtype=torch.float64))).float().view(1, -1, 1, 1)
        self._shift = (torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)).float().view(1, -1, 1, 1)

    def batch(self, indices: Tensor, key: Key) -> Batch:
        train = self.splits["train"]
        images = train.images[indices]
        if self.pad:
            images = _crop(images, self.pad, key.fold(stream="crop"))
        if self.flip:
            mirrored = key.fold(stream="flip").uniform(len(images)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return Batch(self._normal(images), train.labels[indices])

    def plain(self, indices: Tensor) -> Batch:
        train = self.splits["train"]
        return Batch(self._normal(train.images[indices]), train.labels[indices])

    def batches(self, split: str, batch_size: int = 500) -> Iterator[Batch]:
        part = self.splits[split]
        for at in range(0, len(part), batch_size):
            yield Batch(self._normal(part.images[at : at + batch_size]), part.labels[at : at + batch_size])

    def _normal(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mul_(self._scale).sub_(self._shift)


def _crop(images: Tensor, pad: int, key: Key) -> Tensor:
    """Windows of the zero-padded images at offsets uniform in 0 .. 2 pad, uint8 in and out."""
    n, channels, height, width = images.shape
    padded = images.new_zeros((n, channels, height + 2 * pad, width + 2 * pad))
    padded[:, :, pad : pad + height, pad : pad + width] = images
    offsets = (key.uniform(2 * n) * (2 * pad + 1)).long()
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n), :, offsets[:n], offsets[n:]]


def shares(total: int, options: ImageOptions) -> dict[str, np.ndarray]:
    """Rows of the training and validation splits out of ``total`` training samples, ascending.

    Raises:
        RecipeError: ``subset`` asks for more samples than there are, or ``val_fraction`` leaves none.
    """
    order = Key(options.data_seed, "split").numpy().permutation(total)
    held = _some_left(total, round(total * options.val_fraction), options.val_fraction, "data.val_fraction")
    rows = order[held:]
    if options.subset is not None:
        _enough(options.subset, len(rows), "data.subset")
        rows = rows[: options.subset]
    return {"train": np.sort(rows), "val": np.sort(order[:held])}


def rows_of_test(total: int, options: ImageOptions) -> np.ndarray:
    """Rows of the test split, ascending; a subset is drawn by ``data_seed``."""
    if options.test_subset is None:
        return np.arange(total)
    _enough(options.test_subset, total, "data.test_subset")
    return np.sort(Key(options.data_seed, "test-split").numpy().permutation(total)[: options.test_subset])


def divide(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], options: ImageOptions) -> dict[str, Pixels]:
    """The three splits of a set that comes as (images, labels) for training and for testing."""
    parts = shares(len(train[1]), options)
    return {
        "train": Pixels.of(*train, rows=parts["train"]),
        "val": Pixels.of(*train, rows=parts["val"]),
        "test": Pixels.of(*test, rows=rows_of_test(len(test[1]), options)),
    }


def hold_out(total: int, fraction: float, data_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (train, test) of a set that has no test split of its own; the test split has ceil(fraction x total) samples.

    Raises RecipeError where no sample is left for training.
    """
    order = Key(data_seed, "hold-out").numpy().permutation(total)
    held = _some_left(total, math.ceil(total * fraction), fraction, "data.test_fraction")
    return np.sort(order[held:]), np.sort(order[:held])


def _some_left(total: int, held: int, fraction: float, where: str) -> int:
    if held >= total:
        raise RecipeError(Issue(where, f"leaves no training sample of {total}", fraction, "lower it"))
    return held


def _enough(wanted: int, there: int, where: str) -> None:
    if wanted > there:
        raise RecipeError(Issue(where, f"more samples than the set has, which are {there}", wanted, "lower it, or null for all"))


def outline(name: str, total: int, shape: tuple[int, ...], classes: int, options: ImageOptions) -> Task:
    """The sizes of a published set without its samples: enough to predict a run before the data are prepared."""
    task = Task()
    task.name, task.input_shape, task.num_classes = name, shape, classes
    task.num_train = len(shares(total, options)["train"])
    return task
