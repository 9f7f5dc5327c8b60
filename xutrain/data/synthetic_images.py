"""Generated image classes with the interface of the real sets, for smoke runs of large recipes. Every result says synthetic."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from xutrain.data.images import ImageOptions, ImageTask, divide
from xutrain.engine.rng import Key
from xutrain.registry import dataset


@dataset("synthetic_images", summary="generated classes of smooth coloured patterns, any size (not real data)", aliases=("synthetic",))
class SyntheticImages:
    """Class c is a fixed smooth pattern; a sample is that pattern shifted, scaled in contrast and covered by noise."""

    class Options(ImageOptions):
        name: str = "synthetic_images"
        classes: int = Field(10, ge=2, description="Number of classes.")
        size: int = Field(32, ge=4, description="Height and width in pixels.")
        channels: int = Field(3, ge=1, description="Colour channels.")
        samples: int = Field(512, ge=2, description="Number of training samples.")
        test_samples: int = Field(256, ge=1, description="Number of test samples.")
        noise: float = Field(0.25, ge=0, description="Standard deviation of the pixel noise, in units of the full range.")
        augment: bool = Field(False, description="Random crop with padding of size/8 and mirroring, as for the real sets.")

    @staticmethod
    def build(options: Options, seed: int) -> ImageTask:
        patterns = _patterns(options)
        train = _samples(patterns, options.samples, options.noise, Key(options.data_seed, "synthetic-train").numpy())
        test = _samples(patterns, options.test_samples, options.noise, Key(options.data_seed, "synthetic-test").numpy())
        channels = options.channels
        return ImageTask(
            "synthetic_images",
            divide(train, test, options),
            options.classes,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
            pad=options.size // 8 if options.augment else 0,
            flip=options.augment,
            synthetic=True,
        )


def _patterns(options: SyntheticImages.Options) -> np.ndarray:
    """Smooth patterns in [-0.5, 0.5], float32 of shape (classes, channels, size, size): 4x4 random cells, interpolated."""
    rng = Key(options.data_seed, "synthetic-patterns").numpy()
    coarse = rng.standard_normal((options.classes, options.channels, 4, 4), dtype=np.float32)
    at = np.linspace(0, 3, options.size, dtype=np.float32)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(4, dtype=np.float32)))  # linear interpolation, (size, 4)
    smooth = np.einsum("yi,kcij,xj->kcyx", weights, coarse, weights)
    return (smooth / (2 * np.abs(smooth).max(axis=(1, 2, 3), keepdims=True))).astype(np.float32)


def _samples(patterns: np.ndarray, count: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``count`` samples in near-equal classes, uint8 of shape (count, channels, size, size), and their labels."""
    classes, channels, size, _ = patterns.shape
    labels = rng.permutation(np.arange(count) % classes)
    reach = size // 8
    shifts = rng.integers(-reach, reach + 1, (2, count))
    rows = (np.arange(size) + shifts[0][:, None]) % size
    columns = (np.arange(size) + shifts[1][:, None]) % size
    contrast = rng.uniform(0.6, 1.0, (count, 1, 1, 1)).astype(np.float32)
    images = np.empty((count, channels, size, size), np.uint8)
    step = max(1, (1 << 22) // (channels * size * size))  # bounds the float copy to 16 MB
    for a in range(0, count, step):
        s = slice(a, a + step)
        clean = patterns[labels[s, None, None], :, rows[s, :, None], columns[s, None, :]].transpose(0, 3, 1, 2) * contrast[s]
        clean += noise * rng.standard_normal(clean.shape, dtype=np.float32)
        images[s] = np.clip((clean + 0.5) * 255, 0, 255).astype(np.uint8)
    return images, labels.astype(np.int64)
