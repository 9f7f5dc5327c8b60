"""SVHN (cropped digits): 73,257 + 26,032 colour images of house numbers, 32x32 pixels. Prepared by ``xutrain data prepare``."""

from __future__ import annotations

from pydantic import Field

from xutrain.data.base import Task
from xutrain.data.images import ImageOptions, ImageTask, divide, outline
from xutrain.data.store import open_arrays
from xutrain.registry import dataset


@dataset("svhn", summary="SVHN cropped digits, 32x32 colour, 10 classes; needs `xutrain data prepare svhn`")
class Svhn:
    """Digits are never mirrored. Raises DataError when the set is not prepared."""

    class Options(ImageOptions):
        name: str = "svhn"
        augment: bool = Field(False, description="Random crop with 4 pixels of padding for training batches (no mirroring).")

    @staticmethod
    def build(options: Options, seed: int) -> ImageTask:
        stored = open_arrays("svhn")
        train, test = ((stored[f"{role}_images"], stored[f"{role}_labels"]) for role in ("train", "test"))
        splits = divide(train, test, options)
        return ImageTask("svhn", splits, 10, mean=(0.438, 0.444, 0.473), std=(0.198, 0.201, 0.197), pad=4 if options.augment else 0)

    @staticmethod
    def outline(options: Options) -> Task:
        return outline("svhn", 73257, (3, 32, 32), 10, options)
