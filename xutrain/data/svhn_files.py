"""SVHN, cropped digits: MATLAB files with X of shape (32, 32, 3, n) and y from 1 to 10, where 10 stands for 0. No torch here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from xutrain.data.archive import collect, damaged
from xutrain.data.store import Content
from xutrain.errors import DataError, Issue


def read(name: str, path: Path) -> Content:
    """Images uint8 of shape (n, 3, 32, 32) and labels uint8 of shape (n,), training and test.

    Raises:
        DataError: a file is missing or damaged, or scipy, which reads MATLAB files, is not installed.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as reason:
        raise DataError(Issue(name, "reading MATLAB files needs scipy", has_value=False, hint="pip install scipy")) from reason
    files = collect(path, lambda base: base in ("train_32x32.mat", "test_32x32.mat"))
    content: Content = {}
    for role in ("train", "test"):
        base = f"{role}_32x32.mat"
        if base not in files:
            raise DataError(
                Issue(str(path), f"{base} is not there", has_value=False, hint="the cropped digits: train_32x32.mat, test_32x32.mat")
            )
        try:
            both = loadmat(io.BytesIO(files[base]), variable_names=("X", "y"))
            images, labels = both["X"], both["y"].reshape(-1)
        except (MatReadError, OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError) as reason:
            raise damaged(base, reason) from reason
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)) or not set(np.unique(labels)) <= set(range(11)):
            raise damaged(base, f"X {images.dtype} {images.shape}, {len(labels)} labels")
        content[f"{role}_images"] = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
        content[f"{role}_labels"] = (labels % 10).astype(np.uint8)
    return content
