"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 photographs of 32x32 pixels. Prepared once by ``xutrain data prepare``."""

from __future__ import annotations

from pydantic import Field

from xutrain.data.base import Task
from xutrain.data.images import ImageOptions, ImageTask, divide, outline
from xutrain.data.store import open_arrays
from xutrain.registry import dataset

#: The constants of the papers' own code (Xu et al., SAEF and its siblings), used for both sets.
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class CifarOptions(ImageOptions):
    """Options of both CIFAR sets."""

    augment: bool = Field(True, description="Random crop with 4 pixels of padding, and mirroring, for training batches.")


def _build(name: str, classes: int, options: CifarOptions) -> ImageTask:
    stored = open_arrays(name)
    train, test = ((stored[f"{role}_images"], stored[f"{role}_labels"]) for role in ("train", "test"))
    pad = 4 if options.augment else 0
    return ImageTask(name, divide(train, test, options), classes, mean=MEAN, std=STD, pad=pad, flip=options.augment)


@dataset("cifar10", summary="CIFAR-10, 32x32 colour, 10 classes; needs `xutrain data prepare cifar10`")
class Cifar10:
    """Raises DataError when the set is not prepared."""

    class Options(CifarOptions):
        name: str = "cifar10"

    @staticmethod
    def build(options: Options, seed: int) -> ImageTask:
        return _build("cifar10", 10, options)

    @staticmethod
    def outline(options: Options) -> Task:
        return outline("cifar10", 50000, (3, 32, 32), 10, options)


@dataset("cifar100", summary="CIFAR-100, 32x32 colour, 100 classes; needs `xutrain data prepare cifar100`")
class Cifar100:
    """Raises DataError when the set is not prepared."""

    class Options(CifarOptions):
        name: str = "cifar100"

    @staticmethod
    def build(options: Options, seed: int) -> ImageTask:
        return _build("cifar100", 100, options)

    @staticmethod
    def outline(options: Options) -> Task:
        return outline("cifar100", 50000, (3, 32, 32), 100, options)
