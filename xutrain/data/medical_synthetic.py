"""Generated scans of several sites that differ as hospitals do, on MONAI's synthetic images. Every result says synthetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from xutrain.data.segmentation import Scans, SegmentationOptions, SegmentationTask
from xutrain.engine.rng import Key
from xutrain.registry import dataset

Count = Annotated[int, Field(ge=0)]
#: grey levels of background, bystanders and target
Levels = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """How a site's scans look.

    Attributes:
        name: the site's name.
        levels: grey levels of background, bystanders (objects that are not to be found) and target.
        gamma: exponent applied to the image, as a scanner's transfer curve.
        noise: standard deviation of the noise.
        bias: strength of the smooth shading across the field of view.
        radius: smallest and largest radius of objects, as parts of the side.
        stretch: vertical over horizontal extent of the objects.
    """

    name: str
    levels: Levels
    gamma: float
    noise: float
    bias: float
    radius: tuple[float, float]
    stretch: float


#: In alder the target is the brightest, in birch (inverted contrast) the darkest, in cedar the middle one: what one site teaches is wrong
#: at another, as between T1- and T2-weighted images. The other sites are nearer to one of these.
STYLES = (
    Style("alder", (0.15, 0.50, 0.85), 1.0, 0.04, 0.1, (0.12, 0.22), 1.0),
    Style("birch", (0.85, 0.55, 0.20), 1.0, 0.06, 0.2, (0.15, 0.27), 1.4),
    Style("cedar", (0.25, 0.75, 0.50), 1.3, 0.08, 0.3, (0.10, 0.18), 0.8),
    Style("dogwood", (0.30, 0.50, 0.70), 0.8, 0.10, 0.2, (0.13, 0.24), 1.2),
    Style("elm", (0.70, 0.30, 0.50), 1.2, 0.05, 0.3, (0.12, 0.20), 0.9),
    Style("fir", (0.60, 0.40, 0.15), 0.9, 0.12, 0.1, (0.16, 0.26), 1.1),
)
#: a hospital that no client has seen: like alder, with another curve, more noise and more shading
STRANGERS = (
    Style("grove", (0.20, 0.45, 0.75), 1.4, 0.09, 0.35, (0.13, 0.24), 1.15),
    Style("heath", (0.75, 0.50, 0.25), 0.8, 0.09, 0.30, (0.12, 0.22), 0.9),
)


@dataset(
    "medical_synthetic",
    verbs=("federate",),
    summary="generated multi-site scans with masks, 2-D or 3-D, on MONAI's synthetic images (not real data)",
)
class MedicalSynthetic:
    """Objects of two tissues on a background; the target tissue is to be found. Sites differ in contrast (which tissue is the bright
    one), transfer curve, noise, shading, size and shape of the objects, and number of samples."""

    class Options(SegmentationOptions):
        name: str = "medical_synthetic"
        dims: Literal[2, 3] = Field(2, description="2 for images, 3 for volumes.")
        size: int = Field(32, ge=16, description="Side of an image or volume, in pixels.")
        sites: int = Field(3, ge=1, le=32, description="Number of sites that take part in training.")
        unseen: int = Field(0, ge=0, le=len(STRANGERS), description="Number of sites of which there are test samples only.")
        samples: int | list[Count] = Field([48, 72, 96], description="Training samples of each site; a list is repeated if shorter.")
        val_samples: int = Field(16, ge=0, description="Validation samples of each site; 0 leaves that to clients.val_fraction.")
        test_samples: int = Field(40, ge=1, description="Test samples of each site.")
        objects: int = Field(5, ge=2, description="Objects drawn into a sample, targets and bystanders.")
        structures: Literal[1, 2] = Field(1, description="1: the target; 2: all objects, and the target within them.")
        shift: float = Field(1.0, ge=0, le=1, description="How far sites differ: 0 makes them alike, 1 is the full difference.")
        data_seed: int = Field(0, description="Seed of the generated samples; the run's seed does not change them.")

        @model_validator(mode="after")
        def _enough(self) -> MedicalSynthetic.Options:
            if (
                not self.samples
                or (isinstance(self.samples, int) and self.samples < 1)
                or (isinstance(self.samples, list) and 0 in self.samples)
            ):
                raise ValueError("samples: every site needs at least one training sample")
            return self

    @staticmethod
    def build(options: Options, seed: int) -> SegmentationTask:
        styles = [_towards(style, options.shift) for style in (*_styles(options), *STRANGERS[: options.unseen])]
        counts = [options.samples] if isinstance(options.samples, int) else options.samples
        parts: dict[str, list[Scans]] = {"train": [], "val": [], "test": []}
        for i, style in enumerate(styles):
            known = i < options.sites
            wanted = {
                "train": counts[i % len(counts)] if known else 0,
                "val": options.val_samples if known else 0,
                "test": options.test_samples,
            }
            for split, count in wanted.items():
                if count:
                    parts[split].append(_scans(style, i, split, count, options))
        splits = {split: Scans.join(scans) for split, scans in parts.items() if scans}
        names = ("objects", "target") if options.structures == 2 else ("target",)
        sites = tuple(style.name for style in styles)
        return SegmentationTask("medical_synthetic", splits, names, sites, loss=options.loss, augment=options.augment, synthetic=True)


def _styles(options: MedicalSynthetic.Options) -> list[Style]:
    """The styles of the first ``sites`` sites; beyond the table they are drawn by the data seed."""
    drawn = []
    for i in range(len(STYLES), options.sites):
        rng = Key(options.data_seed, "medical-style", i).numpy()
        levels = rng.permutation([0.2, 0.5, 0.8]) + rng.uniform(-0.06, 0.06, 3)
        curve, noise, bias, low, stretch = rng.uniform([0.8, 0.04, 0.1, 0.10, 0.8], [1.4, 0.12, 0.35, 0.15, 1.4])
        drawn.append(Style(f"site{i + 1}", (levels[0], levels[1], levels[2]), curve, noise, bias, (low, low + 0.09), stretch))
    return [*STYLES[: options.sites], *drawn]


def _towards(style: Style, shift: float) -> Style:
    """The style moved from the first one towards itself by ``shift``."""
    base = STYLES[0]

    def mix(a: Any, b: Any) -> Any:
        return tuple(mix(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else (1 - shift) * a + shift * b

    fields = ("levels", "gamma", "noise", "bias", "radius", "stretch")
    return Style(style.name, **{f: mix(getattr(base, f), getattr(style, f)) for f in fields})


def _scans(style: Style, site: int, split: str, count: int, options: MedicalSynthetic.Options) -> Scans:
    """``count`` samples of a site."""
    draw = _painter(style, options)
    images, masks = [], []
    for i in range(count):
        image, labels = draw(Key(options.data_seed, f"medical/{split}", i, site))
        images.append(image)
        masks.append(np.stack([labels > 0, labels == 2]) if options.structures == 2 else (labels == 2)[None])
    cases = tuple(f"{style.name}-{split}-{i:03d}" for i in range(count))
    pixels = torch.from_numpy(np.stack(images)[:, None])
    return Scans(pixels, torch.from_numpy(np.stack(masks).astype(np.uint8)), torch.full((count,), site), cases)


def _painter(style: Style, options: MedicalSynthetic.Options) -> Callable[[Key], tuple[np.ndarray, np.ndarray]]:
    """A function from a key to an image, float32 in 0 .. 1, and its labels: 1 bystander, 2 target."""
    from monai.data.synthetic import create_test_image_2d, create_test_image_3d
    from monai.transforms import AdjustContrast, RandBiasField

    side = options.size
    canvas = [round(side * max(1.0, 1 / style.stretch)), round(side * max(1.0, style.stretch))]  # squeezed into a square afterwards
    sides = [side, *canvas] if options.dims == 3 else canvas
    least = max(2, round(style.radius[0] * side))
    most = max(least + 1, min(round(style.radius[1] * side), (min(sides) - 1) // 2))
    create: Any = create_test_image_3d if options.dims == 3 else create_test_image_2d
    shade: Any = RandBiasField(prob=1.0, degree=2, coeff_range=(style.bias / 2, style.bias))
    curve = AdjustContrast(gamma=style.gamma)
    levels = np.array(style.levels, dtype=np.float32)

    def paint(key: Key) -> tuple[np.ndarray, np.ndarray]:
        state = np.random.RandomState(key.words[0])
        labels, draws = np.zeros(sides, dtype=np.int32), 0
        while (labels == 2).mean() < 0.01 * 0.5 ** (draws // 50):  # a few small balls may never fill a hundredth of a volume
            _, labels = create(*sides, num_objs=options.objects, rad_max=most, rad_min=least, num_seg_classes=2, random_state=state)
            draws += 1
        for axis in range(labels.ndim):  # nearest neighbour
            at = (np.arange(side) * labels.shape[axis]) // side
            labels = labels.take(at, axis)
        shaded = shade.set_random_state(state=state)(torch.from_numpy(levels[labels])[None])
        image = np.asarray(curve(shaded)[0])
        image = image / max(1.0, float(image.max())) + state.normal(0, style.noise, image.shape)
        return np.clip(image, 0, 1).astype(np.float32), labels

    return paint
