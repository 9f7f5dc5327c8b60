"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28 pixels. Prepared once by ``xutrain data prepare``."""

from __future__ import annotations

from pydantic import Field

from xutrain.data.base import Task
from xutrain.data.images import ImageOptions, ImageTask, divide, outline
from xutrain.data.store import open_arrays
from xutrain.registry import dataset


@dataset("fashion_mnist", summary="Fashion-MNIST, 28x28 grey, 10 classes; needs `xutrain data prepare fashion_mnist`")
class FashionMnist:
    """Raises DataError when the set is not prepared."""

    class Options(ImageOptions):
        name: str = "fashion_mnist"
        augment: bool = Field(False, description="Random crop with 2 pixels of padding, and mirroring, for training batches.")

    @staticmethod
    def build(options: Options, seed: int) -> ImageTask:
        stored = open_arrays("fashion_mnist")
        train, test = ((stored[f"{role}_images"], stored[f"{role}_labels"]) for role in ("train", "test"))
        pad = 2 if options.augment else 0
        return ImageTask("fashion_mnist", divide(train, test, options), 10, mean=(0.286,), std=(0.353,), pad=pad, flip=options.augment)

    @staticmethod
    def outline(options: Options) -> Task:
        return outline("fashion_mnist", 60000, (1, 28, 28), 10, options)
