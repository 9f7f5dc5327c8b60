"""The samples of a run's datalists, kept on disk as they leave the reader and mapped into memory.

Files are read, checked and resampled once for one set of files and options; then every process of a run, every resumed run and every
run of a sweep maps the same pages, so memory is shared and nothing is read twice. A folder holds ``images.bin`` (float32),
``masks.bin`` (uint8) and ``index.json``; its name is a hash of the options and of every file's path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from xutrain.data.store import data_root
from xutrain.errors import DataError, Issue

#: raised when the reader's result for the same files changes
VERSION = 1
#: folders that no run has opened for so long are removed
UNUSED_DAYS = 30


@dataclass(frozen=True)
class Block:
    """Samples of one item: float32 (n, C, ...), uint8 (n, S, ...), where they belong, millimetres between pixels (None: not known)."""

    split: str
    site: int
    case: str
    images: Tensor
    masks: Tensor
    spacing: tuple[float, ...] | None = None


Make = Callable[[], Iterable[Block]]
Pad = Callable[[Tensor, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Samples:
    """All samples, those of a split together: mapped images and masks, split, site, case and spacing of each."""

    images: Tensor
    masks: Tensor
    splits: tuple[str, ...]
    sites: tuple[int, ...]
    cases: tuple[str, ...]
    spacings: tuple[list[float] | None, ...]


def key_of(files: Iterable[Path], *what: Any) -> str:
    """A name for the samples that ``files`` give under the options ``what``: another one once a file has changed."""
    import monai

    digest = hashlib.sha256(repr((VERSION, monai.__version__, *what)).encode())
    for file in files:
        state = [(f, f.stat()) for f in (sorted(file.rglob("*")) if file.is_dir() else [file])]
        digest.update(repr([(str(f.resolve()), s.st_size, s.st_mtime_ns) for f, s in state]).encode())
    return digest.hexdigest()[:32]


def kept(key: str, make: Make, pad: Pad, least: tuple[int, ...] | None = None) -> Samples:
    """The samples called ``key``, made when they are not there. Processes that ask at once wait for the one that makes them.

    Args:
        make: yields the blocks, those of a split one after the other; may raise, then nothing is kept.
        pad: brings a block's images or masks to the largest sides of all blocks and of ``least``, where these differ.

    Raises:
        DataError: whatever ``make`` raises, or no room on the disk.
    """
    root = Path(os.environ.get("XUTRAIN_SAMPLES") or data_root() / ".samples").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError:  # prepared data that is read-only: made for this process alone, and gone when it ends
        with tempfile.TemporaryDirectory(prefix="xutrain-samples-") as alone:
            return _made(Path(alone) / key, make, pad, least)
    with FileLock(root / f"{key}.lock"):
        folder = root / key
        if not (folder / "index.json").is_file():
            _remove_unused(root)
            return _made(folder, make, pad, least)
        os.utime(folder / "index.json")
        return _mapped(folder)


def _made(folder: Path, make: Make, pad: Pad, least: tuple[int, ...] | None) -> Samples:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        folder.mkdir(parents=True)
        index = _write(folder, make(), pad, least)
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    except OSError as reason:
        shutil.rmtree(folder, ignore_errors=True)
        hint = "XUTRAIN_SAMPLES may name a folder with room"
        raise DataError(Issue(str(folder), f"samples cannot be kept: {reason.strerror}", has_value=False, hint=hint)) from reason
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _mapped(folder)


def _write(folder: Path, blocks: Iterable[Block], pad: Pad, least: tuple[int, ...] | None) -> dict[str, Any]:
    """Writes the blocks as they come, and once more, padded, where their sides differ. Returns what the index says."""
    rows: list[dict[str, Any]] = []
    with (folder / "images.bin").open("wb") as images, (folder / "masks.bin").open("wb") as masks:
        for block in blocks:
            _append(images, block.images)
            _append(masks, block.masks)
            shapes = {"images": list(block.images.shape), "masks": list(block.masks.shape)}
            rows.append({"split": block.split, "site": block.site, "case": block.case, "spacing": block.spacing, **shapes})
    assert rows, "no samples"
    sides = tuple(max(s) for s in zip(least or rows[0]["images"][2:], *(row["images"][2:] for row in rows), strict=True))
    for name, kind in (("images", np.float32), ("masks", np.uint8)):
        if any(tuple(row[name][2:]) != sides for row in rows):
            parts = _split(folder / f"{name}.bin", [row[name] for row in rows], kind)
            with (folder / "padded.bin").open("wb") as file:
                for part in parts:
                    _append(file, pad(part, sides))
            (folder / "padded.bin").replace(folder / f"{name}.bin")
    heads = {name: [sum(row[name][0] for row in rows), rows[0][name][1], *sides] for name in ("images", "masks")}
    samples = [[row["split"], row["site"], row["case"], row["spacing"]] for row in rows for _ in range(row["images"][0])]
    return {**heads, "samples": samples}


def _append(file: IO[bytes], values: Tensor) -> None:
    file.write(values.contiguous().numpy().tobytes())


def _split(file: Path, shapes: Sequence[Sequence[int]], kind: type) -> Iterable[Tensor]:
    at, flat = 0, np.memmap(file, kind, mode="r")
    for shape in shapes:
        size = int(np.prod(shape))
        yield torch.from_numpy(np.array(flat[at : at + size]).reshape(shape))
        at += size


def _mapped(folder: Path) -> Samples:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    # copy on write: torch wants memory that may be written to, and the file stays as it is
    images, masks = (
        torch.from_numpy(np.memmap(folder / f"{name}.bin", kind, mode="c", shape=tuple(index[name])))
        for name, kind in (("images", np.float32), ("masks", np.uint8))
    )
    splits, sites, cases, spacings = zip(*index["samples"], strict=True)
    return Samples(images, masks, splits, sites, cases, spacings)


def _remove_unused(root: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for index in root.glob("*/index.json"):
        if index.stat().st_mtime < oldest:
            shutil.rmtree(index.parent, ignore_errors=True)
