"""Tiny medical files in their true formats: NIfTI, pictures, datalists of several sites."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image


def ellipsoid(shape: tuple[int, ...], at: float = 0.5, radius: float = 0.3) -> np.ndarray:
    """A bool array with an ellipsoid about the relative position ``at``."""
    axes = np.meshgrid(*(np.arange(n) / n - at for n in shape), indexing="ij")
    return sum(a**2 for a in axes) < radius**2


def scan(rng: np.random.Generator, mask: np.ndarray, gain: float = 100, bias: float = 20, noise: float = 5) -> np.ndarray:
    """Intensities, float32: bias + gain inside + noise."""
    return (bias + gain * mask + noise * rng.standard_normal(mask.shape)).astype(np.float32)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def picture(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def site(root: Path, name: str, *, cases: int = 4, shape: tuple[int, ...] = (16, 16, 4), gain: float = 100, seed: int = 0) -> Path:
    """A site of volumes in the project's own layout; returns its datalist (2 training, 1 validation, 1 testing for 4 cases)."""
    rng = np.random.default_rng([seed, len(name), *name.encode()])
    items = []
    for i in range(cases):
        mask = ellipsoid(shape, 0.5, 0.25 + 0.02 * i)
        nifti(root / name / "Image" / f"case{i}.nii.gz", scan(rng, mask, gain))
        nifti(root / name / "Mask" / f"case{i}.nii.gz", mask.astype(np.uint8))
        items.append({"image": f"Image/case{i}.nii.gz", "label": f"Mask/case{i}.nii.gz"})
    splits = {"training": items[: cases - 2], "validation": items[-2:-1], "testing": items[-1:]}
    file = root / name / "datalist.json"
    file.write_text(json.dumps(splits))
    return file
