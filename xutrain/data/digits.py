"""Handwritten digits of scikit-learn: 1,797 real images of 8x8 pixels in 16 grey levels. Always there, nothing to download."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from xutrain.data.images import ImageOptions, ImageTask, divide, hold_out
from xutrain.registry import dataset


@dataset("digits", summary="1,797 handwritten digits, 8x8, real, shipped with scikit-learn", aliases=("sklearn_digits",))
class Digits:
    """The UCI test set of handwritten digits, split by ``data_seed`` into training, validation and test samples."""

    class Options(ImageOptions):
        name: str = "digits"
        test_fraction: float = Field(0.2, gt=0, lt=1, description="Part of the 1,797 images that is kept for testing (0.2: 360 images).")
        standardise: bool = Field(True, description="Subtract the mean and divide by the deviation; false leaves pixels in 0 .. 1.")

    @staticmethod
    def build(options: Options, seed: int) -> ImageTask:
        from sklearn.datasets import load_digits

        raw = load_digits()
        images, labels = raw.images.astype(np.uint8)[:, None], raw.target
        train, test = hold_out(len(labels), options.test_fraction, options.data_seed)
        splits = divide((images[train], labels[train]), (images[test], labels[test]), options)
        mean, std = (0.305, 0.376) if options.standardise else (0.0, 1.0)
        return ImageTask("digits", splits, 10, mean=(mean,), std=(std,), peak=16.0)
