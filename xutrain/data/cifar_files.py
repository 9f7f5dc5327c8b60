"""CIFAR-10 and CIFAR-100 in all the forms in which people have them. No torch here.

Pickled batches (rows of 3,072 bytes, planar), the binary version (label bytes, then a planar row), parquet (encoded images),
and rows of pixels in PNG files with labels in JSON.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data.archive import collect, damaged
from xutrain.data.store import Content
from xutrain.errors import DataError, Issue

PIXELS = 3 * 32 * 32
_ROLE = re.compile(r"(?P<test>test)|(?P<train>train|data_batch)")
_FORMS = {
    "pickle": re.compile(r"^(data_batch_\d+|test_batch|train|test)$"),
    "binary": re.compile(r"^(data_batch_\d+|test_batch|train|test)\.bin$"),
    "parquet": re.compile(r"^.*(train|test).*\.parquet$"),
    "png": re.compile(r"^(data_batch_\d+|test_batch)\.png$|^(train|test)_la[a-z]+\.json$"),  # one package writes "lables"
}


def read(name: str, path: Path) -> Content:
    """Images uint8 of shape (n, 3, 32, 32) and labels uint8 of shape (n,), training and test, in the files' order.

    Raises:
        DataError: nothing of a known form is there, a file is damaged, or images and labels do not match.
    """
    files = collect(path, lambda base: any(form.match(base) for form in _FORMS.values()))
    decoders = {"pickle": _pickled, "binary": _binary, "parquet": _parquet, "png": _png}
    for form, pattern in _FORMS.items():
        chosen = {base: files[base] for base in sorted(files) if pattern.match(base)}
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
        if chosen:
            for base, images, labels in decoders[form](name, chosen):
                match = _ROLE.search(base)
                assert match is not None
                parts["test" if match["test"] else "train"].append(_checked(name, base, images, labels))
        if parts["train"] and parts["test"]:
            joined = {role: [np.concatenate(column) for column in zip(*some, strict=True)] for role, some in parts.items()}
            return {f"{role}_{what}": joined[role][i] for role in joined for i, what in enumerate(("images", "labels"))}
    what = f"holds no {name} that can be read; seen: {', '.join(sorted(files)) or 'nothing of it'}"
    hint = "accepted: the original tar.gz or its folder, the binary version, parquet files named train and test"
    raise DataError(Issue(str(path), what, has_value=False, hint=hint))


def _checked(name: str, base: str, images: np.ndarray, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    classes = 100 if name == "cifar100" else 10
    if labels.ndim != 1 or len(labels) != len(images) or not len(labels):
        raise damaged(base, f"{len(images)} images and labels of shape {labels.shape}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise damaged(base, f"labels are not integers from 0 to {classes - 1}")
    return images, labels.astype(np.uint8)


class _OnlyArrays(pickle.Unpickler):
    """An unpickler that can build arrays, dictionaries, lists, text and bytes, and can call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        short = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        try:
            return _ALLOWED[short, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a CIFAR batch has no use for") from None


def _latin1(text: str, coding: str) -> bytes:
    """How a new Python pickles bytes for an old one."""
    if coding != "latin1":
        raise pickle.UnpicklingError(f"text in {coding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
#: What a damaged pickle makes the unpickler raise.
_UNPICKLING = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError, OverflowError)


def _pickled(name: str, files: dict[str, bytes]) -> list[tuple[str, np.ndarray, Any]]:
    parts = []
    for base, data in files.items():
        try:
            batch = _OnlyArrays(io.BytesIO(data), encoding="bytes").load()
        except _UNPICKLING as reason:
            raise damaged(base, reason) from reason
        if not isinstance(batch, dict):
            raise damaged(base, f"a {type(batch).__name__} instead of a dictionary")
        fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        rows, labels = fields.get("data"), fields.get("fine_labels" if name == "cifar100" else "labels")
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != PIXELS or labels is None:
            raise damaged(base, f"no uint8 rows of {PIXELS} with labels for {name}; keys {sorted(map(str, fields))}")
        parts.append((base, rows.reshape(-1, 3, 32, 32), labels))
    return parts


def _binary(name: str, files: dict[str, bytes]) -> list[tuple[str, np.ndarray, Any]]:
    lead = 2 if name == "cifar100" else 1  # coarse and fine label, or the label
    parts = []
    for base, data in files.items():
        if len(data) % (lead + PIXELS):
            raise damaged(base, f"{len(data)} bytes are no multiple of {lead + PIXELS}")
        rows = np.frombuffer(data, np.uint8).reshape(-1, lead + PIXELS)
        parts.append((base, rows[:, lead:].reshape(-1, 3, 32, 32), rows[:, lead - 1]))
    return parts


def _parquet(name: str, files: dict[str, bytes]) -> list[tuple[str, np.ndarray, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as reason:
        raise DataError(Issue(next(iter(files)), "reading parquet needs pyarrow", has_value=False, hint="pip install pyarrow")) from reason
    parts = []
    for base, data in files.items():
        try:
            table = parquet.read_table(io.BytesIO(data))
        except (ArrowException, OSError) as reason:
            raise damaged(base, reason) from reason
        image = next((c for c in ("img", "image") if c in table.column_names), None)
        label = next((c for c in ("fine_label", "label") if c in table.column_names), None)
        if image is None or label is None:
            raise damaged(base, f"columns {table.column_names}, wanted img or image, and label or fine_label")
        encoded = [row["bytes"] if isinstance(row, dict) else row for row in table.column(image).to_pylist()]
        parts.append((base, _stacked(base, [_decoded(base, e) for e in encoded]), table.column(label).to_numpy()))
    return parts


def _stacked(base: str, images: list[np.ndarray]) -> np.ndarray:
    """Pictures (32, 32, 3) as one planar array, (n, 3, 32, 32)."""
    if odd := [i.shape for i in images if i.shape != (32, 32, 3)]:
        raise damaged(base, f"an image of {odd[0][1]}x{odd[0][0]} pixels")
    return np.array(images, np.uint8).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def _png(name: str, files: dict[str, bytes]) -> list[tuple[str, np.ndarray, Any]]:
    labels: dict[str, list[int]] = {}
    for base, data in files.items():
        if base.endswith(".json"):
            try:
                labels["test" if "test" in base else "train"] = json.loads(data)
            except ValueError as reason:
                raise damaged(base, reason) from reason
    parts, at = [], {"train": 0, "test": 0}
    for base, data in files.items():
        if base.endswith(".png"):
            images = _decoded(base, data).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
            role = "test" if "test" in base else "train"
            parts.append((base, images, labels.get(role, [])[at[role] : at[role] + len(images)]))
            at[role] += len(images)
    return parts


def _decoded(base: str, data: Any) -> np.ndarray:
    """RGB bytes of an encoded image, a multiple of 3,072 of them."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 10_000 * 1024
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as reason:
        raise damaged(base, reason) from reason
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if pixels.size % PIXELS:
        raise damaged(base, f"an image of {pixels.shape[1]}x{pixels.shape[0]} pixels")
    return pixels
