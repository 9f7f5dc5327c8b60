"""Fashion-MNIST (and MNIST) in the IDX format: big-endian header, then bytes; usually gzipped. No torch here."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np

from xutrain.data.archive import collect, damaged, gunzip
from xutrain.data.store import Content
from xutrain.errors import DataError, Issue

_FILES = re.compile(r"^(?P<role>train|t10k)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?$")


def read(name: str, path: Path) -> Content:
    """Images uint8 of shape (n, 1, height, width) and labels uint8 of shape (n,), training and test.

    Raises:
        DataError: one of the four files is missing, damaged, or images and labels do not match.
    """
    content: Content = {}
    for base, data in collect(path, lambda base: bool(_FILES.match(base))).items():
        match = _FILES.match(base)
        assert match is not None
        array = idx(base, gunzip(base, data), 3 if match["what"] == "images" else 1)
        content[f"{'train' if match['role'] == 'train' else 'test'}_{match['what']}"] = array[:, None] if array.ndim == 3 else array
    for role in ("train", "test"):
        images, labels = content.get(f"{role}_images"), content.get(f"{role}_labels")
        if images is None or labels is None:
            hint = "wanted: train-images-idx3-ubyte(.gz), train-labels-idx1-ubyte, t10k-images-..., t10k-labels-..."
            raise DataError(Issue(str(path), f"{role} images or labels of {name} are not there", has_value=False, hint=hint))
        assert isinstance(labels, np.ndarray)
        if len(images) != len(labels) or not len(labels) or labels.max() > 9:
            raise damaged(str(path), f"{len(images)} {role} images, {len(labels)} labels")
    return content


def idx(base: str, data: bytes, axes: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file with ``axes`` axes."""
    head = 4 + 4 * axes
    if len(data) < head or data[:4] != bytes((0, 0, 8, axes)):
        raise damaged(base, f"no IDX file of bytes with {axes} axes")
    shape = struct.unpack(f">{axes}I", data[4:head])
    if len(data) != head + math.prod(shape):
        raise damaged(base, f"{len(data) - head} bytes for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
