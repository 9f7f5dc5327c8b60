"""Small data sets in the file formats of the real ones."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

Arrays = dict[str, np.ndarray]


def cifar(seed: int = 0, rows: int = 4, classes: int = 10) -> Arrays:
    """Five training batches and a test batch of ``rows`` images, as prepared arrays."""
    rng = np.random.default_rng(seed)
    return {
        "train_images": rng.integers(0, 256, (5 * rows, 3, 32, 32), dtype=np.uint8),
        "train_labels": rng.integers(0, classes, 5 * rows, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8),
        "test_labels": rng.integers(0, classes, rows, dtype=np.uint8),
    }


def batches(arrays: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels by the names of CIFAR-10's files."""
    rows = len(arrays["test_labels"])
    cut = {
        f"data_batch_{i + 1}": (arrays["train_images"][i * rows : (i + 1) * rows], arrays["train_labels"][i * rows : (i + 1) * rows])
        for i in range(5)
    }
    return {**cut, "test_batch": (arrays["test_images"], arrays["test_labels"])}


def pickled(folder: Path, arrays: Arrays) -> Path:
    """CIFAR-10's original folder: pickles with keys of bytes."""
    folder.mkdir(parents=True)
    for name, (images, labels) in batches(arrays).items():
        batch = {b"data": images.reshape(len(images), -1), b"labels": labels.tolist(), b"batch_label": b"x", b"filenames": [b"a.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat"]}, protocol=2))
    return folder


def tarball(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return path


def binary(folder: Path, arrays: Arrays) -> Path:
    folder.mkdir(parents=True)
    for name, (images, labels) in batches(arrays).items():
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[:, None], images.reshape(len(images), -1)]).tobytes())
    return folder


def png_rows(folder: Path, arrays: Arrays) -> Path:
    """One image a row of pixels, labels in JSON: the layout of the package that ships CIFAR-10."""
    folder.mkdir(parents=True)
    for name, (images, _) in batches(arrays).items():
        pixels = images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(arrays["train_labels"].tolist()))
    (folder / "test_lables.json").write_text(json.dumps(arrays["test_labels"].tolist()))
    return folder


def parquet(folder: Path, arrays: Arrays, order: list[int]) -> Path:
    """Parquet files with encoded images; the training batches in another order, as copies of the archive have them."""
    import pyarrow
    from pyarrow import parquet as files

    folder.mkdir(parents=True)
    named = batches(arrays)
    parts = {"train": [named[f"data_batch_{i}"] for i in order], "test": [named["test_batch"]]}
    for role, some in parts.items():
        images, labels = (np.concatenate(x) for x in zip(*some, strict=True))
        encoded = [{"bytes": _png(image.transpose(1, 2, 0)), "path": None} for image in images]
        table = pyarrow.table({"img": encoded, "label": labels.astype(np.int64)})
        files.write_table(table, folder / f"{role}-00000-of-00001.parquet")
    return folder


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def idx(folder: Path, *, zipped: bool = True) -> tuple[Path, Arrays]:
    """Fashion-MNIST's four files."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    arrays: Arrays = {}
    for role, word, rows in (("train", "train", 12), ("test", "t10k", 5)):
        images = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, rows, dtype=np.uint8)
        arrays |= {f"{role}_images": images[:, None], f"{role}_labels": labels}
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            name = f"{word}-{what}-ubyte"
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)
    return folder, arrays


def image_folder(folder: Path, classes: int = 3, each: int = 4) -> Path:
    """ROOT/train and ROOT/val with class folders of small JPEG files; class c is a shade of its own."""
    for split, count in (("train", each), ("val", 2)):
        for c in range(classes):
            place = folder / split / f"n{c:04d}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40 + 4 * i, 52, 3), 60 * c + 20, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.JPEG", quality=95)
    return folder
