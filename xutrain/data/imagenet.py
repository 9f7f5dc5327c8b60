"""ImageNet, or any photographs in class folders: decoded when a batch asks for them, cropped by keyed randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xutrain.data.base import Batch, Task
from xutrain.data.folder_files import scan
from xutrain.data.images import ImageOptions, outline, rows_of_test, shares
from xutrain.data.store import data_root, missing, recorded
from xutrain.engine.rng import Key
from xutrain.errors import DataError, Issue
from xutrain.registry import dataset

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderTask(Task):
    """Photographs in class folders. Training: random resized crop and mirror; else resize the shorter side, centre crop."""

    def __init__(self, name: str, splits: dict[str, list[tuple[str, int]]], num_classes: int, size: int, threads: int) -> None:
        self.name, self.num_classes, self.size, self.threads = name, num_classes, size, threads
        self.splits = splits
        self.input_shape = (3, size, size)
        self.num_train = len(splits["train"])
        self.labels = torch.tensor([label for _, label in splits["train"]])

    def batch(self, indices: Tensor, key: Key) -> Batch:
        # per sample: 10 pairs (area, log ratio) as in torchvision's RandomResizedCrop, two for the place, one for the mirror
        draws = key.fold(stream="resized-crop").uniform(23 * len(indices)).view(-1, 23).tolist()
        items = [self.splits["train"][int(i)] for i in indices]
        return self._decoded(items, [partial(_random_crop, size=self.size, u=u) for u in draws])

    def plain(self, indices: Tensor) -> Batch:
        items = [self.splits["train"][int(i)] for i in indices]
        return self._decoded(items, [partial(_centre_crop, size=self.size)] * len(items))

    def batches(self, split: str, batch_size: int = 500) -> Iterator[Batch]:
        items = self.splits[split]
        for at in range(0, len(items), batch_size):
            some = items[at : at + batch_size]
            yield self._decoded(some, [partial(_centre_crop, size=self.size)] * len(some))

    def _decoded(self, items: Sequence[tuple[str, int]], crops: Sequence[Callable[[Image], Image]]) -> Batch:
        paths = [path for path, _ in items]
        if self.threads > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                pixels = list(pool.map(_open, paths, crops))
        else:
            pixels = list(map(_open, paths, crops))
        inputs = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        inputs.div_(255).sub_(torch.tensor(MEAN).view(1, 3, 1, 1)).div_(torch.tensor(STD).view(1, 3, 1, 1))
        return Batch(inputs, torch.tensor([label for _, label in items]))


def _open(path: str, crop: Callable[[Image], Image]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(crop(image.convert("RGB")), dtype=np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as reason:
        raise DataError(Issue(path, f"cannot be decoded: {reason}", has_value=False, hint="replace or remove the file")) from reason


def _random_crop(image: Image, size: int, u: Sequence[float]) -> Image:
    """A part of 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, resized to ``size``; mirrored half the time."""
    width, height = image.size
    box = (0, 0, width, height)
    for area, ratio in zip(u[0:20:2], u[1:20:2], strict=True):
        target, aspect = width * height * (0.08 + 0.92 * area), math.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1))
            box = (left, top, left + w, top + h)
            break
    else:
        side = min(width, height)
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    cropped = image.resize((size, size), _bilinear(), box=box)
    return _mirrored(cropped) if u[22] < 0.5 else cropped


def _centre_crop(image: Image, size: int) -> Image:
    """The shorter side to 256/224 of ``size``, then the central square."""
    width, height = image.size
    scale = round(size * 256 / 224) / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), _bilinear()).crop((left, top, left + size, top + size))


def _bilinear() -> int:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _mirrored(image: Image) -> Image:
    from PIL import Image

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@dataset("imagenet", summary="ImageNet or any train/val folders of class folders, decoded on the fly", aliases=("image_folder",))
class ImageNet:
    """``val`` of the folder is split ``test`` here; ``val_fraction`` takes split ``val`` from the training images."""

    class Options(ImageOptions):
        name: str = "imagenet"
        path: str | None = Field(
            None, description="Folder with train/CLASS and val/CLASS; null takes the one given to `xutrain data prepare`."
        )
        image_size: int = Field(224, ge=8, description="Height and width of the crops in pixels.")
        threads: int = Field(4, ge=1, description="Threads of each process that decode images.")

    @staticmethod
    def build(options: Options, seed: int) -> FolderTask:
        hint = "xutrain data prepare imagenet --source FOLDER, or set data.path"
        if options.path is None and not (data_root() / "imagenet").is_dir():
            raise missing("imagenet", data_root() / "imagenet", hint=hint)
        folder = Path(options.path if options.path is not None else recorded("imagenet")["folder"]).expanduser()
        if not folder.is_dir():
            raise missing("imagenet", folder, "has no such folder", hint)
        classes, train = scan(folder / "train")
        others, test = scan(folder / "val")
        if classes != others:
            raise DataError(Issue(str(folder), "train and val have different classes", has_value=False))
        splits = {split: [train[i] for i in rows] for split, rows in shares(len(train), options).items()}
        splits["test"] = [test[i] for i in rows_of_test(len(test), options)]
        return FolderTask("imagenet", splits, len(classes), options.image_size, options.threads)

    @staticmethod
    def outline(options: Options) -> Task:
        return outline("imagenet", 1281167, (3, options.image_size, options.image_size), 1000, options)
