"""Image folders: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, as ImageNet is usually laid out. They stay where they are."""

from __future__ import annotations

import os
from pathlib import Path

from xutrain.data.store import Folder
from xutrain.errors import DataError, Issue

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


def read(name: str, path: Path) -> Folder:
    """Check the layout and count the images. Raises DataError when a split is missing or the classes differ."""
    classes, train = scan(path / "train")
    others, val = scan(path / "val")
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise DataError(Issue(str(path), f"train and val have different classes, for example {odd[:3]}", has_value=False, hint=LAYOUT))
    return Folder(path, {"classes": len(classes), "train": len(train), "val": len(val)})


LAYOUT = "wanted: train/CLASS/*.JPEG and val/CLASS/*.JPEG with the same class folders"


def scan(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names in alphabetical order, and (path, class) of every image, classes and files in alphabetical order.

    Raises:
        DataError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise DataError(Issue(str(folder), "no such folder", has_value=False, hint=LAYOUT))
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir())
    images = []
    for label, name in enumerate(classes):
        images += [(f, label) for f in sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(ENDINGS))]
    if not images:
        raise DataError(Issue(str(folder), "no images in class folders", has_value=False, hint=LAYOUT))
    return classes, images
