"""Samples of datalists are read once, then mapped: by every process, every later run, without a second copy in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_medical as tiny
import torch
from test_datalists import build

from xutrain.data import medical_datalists, medical_samples
from xutrain.data.segmentation import Scans
from xutrain.errors import DataError


@pytest.fixture
def two(tmp_path: Path) -> Path:
    tiny.site(tmp_path, "A", shape=(13, 17, 5))
    tiny.site(tmp_path, "B", shape=(11, 19, 3), gain=60)
    return tmp_path


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many items have been read from disk so far, by all processes."""
    real, log = medical_datalists.load, tmp_path / "reads"
    log.touch()

    def load(item: Any, form: Any) -> Any:
        with log.open("a") as file:
            file.write("x")
        return real(item, form)

    monkeypatch.setattr(medical_datalists, "load", load)
    return lambda: len(log.read_text())


def same(a: Any, b: Any) -> bool:
    one, other = ([t.scans, *t.splits.values()] for t in (a, b))
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.masks, y.masks) and torch.equal(x.sites, y.sites) and x.cases == y.cases
        for x, y in zip(one, other, strict=True)
    )


def test_files_are_read_once(two: Path, reads: Callable[[], int], samples: Path) -> None:
    first = build(two)
    assert reads() == 8 and len(list(samples.glob("*/index.json"))) == 1
    assert same(first, build(two)) and reads() == 8
    build(two, window=[0.0, 150.0])
    assert reads() == 16, "other options, other samples"
    tiny.nifti(two / "A/Mask/case0.nii.gz", tiny.ellipsoid((13, 17, 5), 0.5, 0.4).astype(np.uint8))
    changed = build(two)
    assert reads() == 24 and not torch.equal(changed.scans.masks[0], first.scans.masks[0]), "a file has changed"


def test_training_and_validation_are_one_piece_of_mapped_memory(two: Path) -> None:
    task = build(two)
    pool, train, val = task.scans.images, task.splits["train"].images, task.splits["val"].images
    assert train.data_ptr() == pool.data_ptr() and len(train) + len(val) == len(pool)
    assert val.data_ptr() == pool[len(train) :].data_ptr()
    assert task.splits["test"].images.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
    before = build(two).scans.images.clone()
    pool.zero_()
    assert torch.equal(build(two).scans.images, before), "what a process does to its samples stays with it"


def test_pieces_elsewhere_are_joined_by_a_copy() -> None:
    values = torch.arange(24.0).view(6, 1, 2, 2)
    sites = torch.zeros(6, dtype=torch.int64)
    whole = Scans(values, values > 3, sites, tuple("abcdef"))
    assert Scans.join([whole.part(0, 2), whole.part(2, 5)]).images.data_ptr() == values.data_ptr()
    for parts in ([whole.part(2, 5), whole.part(0, 2)], [whole.part(0, 2), whole.part(3, 5)], [whole, whole]):
        joined = Scans.join(parts)
        assert torch.equal(joined.images, torch.cat([p.images for p in parts])) and joined.images.data_ptr() != values.data_ptr()


def test_sizes_that_differ_are_padded_on_disk(two: Path) -> None:
    task = build(two, dims=3, size=None, patch=[2, 16, 8])
    assert task.scans.images.shape[2:] == (5, 19, 13) == task.scans.masks.shape[2:]
    plain = build(two, lists={"B": "B"}, dims=3, size=None)
    assert plain.scans.images.shape[2:] == (3, 19, 11)
    inner = task.scans.images[task.scans.sites == 1][:, :, 1:4, :, 1:12]
    assert torch.equal(inner[:2], plain.splits["train"].images) and not task.scans.images[task.scans.sites == 1][:, :, 0].any()


def _together(root: str, reads: str) -> tuple[float, int]:
    task = build(Path(root))
    return float(task.scans.images.double().sum()), len(Path(reads).read_text())


def test_processes_wait_for_the_one_that_reads(two: Path, reads: Callable[[], int], forked: Any) -> None:
    found = forked(_together, 3, str(two), str(two / "reads"))
    assert len({total for total, _ in found}) == 1 and {count for _, count in found} == {8}


def test_half_written_and_unused_samples_go(two: Path, reads: Callable[[], int], samples: Path) -> None:
    first = build(two)
    (folder,) = (index.parent for index in samples.glob("*/index.json"))
    (folder / "index.json").unlink()  # as if the process had been killed before its end
    (folder / "images.bin").unlink()  # not written over: ``first`` is still mapped to it
    (folder / "images.bin").write_bytes(b"half")
    assert same(first, build(two)) and reads() == 16
    os.utime(folder / "index.json", (0, 0))
    build(two, size=[16, 32])
    assert not folder.exists()


def test_faults_leave_nothing_and_are_found_again(two: Path, samples: Path) -> None:
    (two / "A/Mask/case1.nii.gz").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"case1\.nii\.gz"):
            build(two)
        assert not [f for f in samples.iterdir() if f.is_dir()]


def test_without_a_place_of_their_own(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data may be read-only: then every process makes its samples for itself."""
    first = build(two)
    (two / "file").touch()
    monkeypatch.setenv("XUTRAIN_SAMPLES", str(two / "file" / "below"))
    assert same(first, build(two))


def test_no_room(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(medical_samples, "_append", full)
    with pytest.raises(DataError, match="No space left") as caught:
        build(two)
    assert "XUTRAIN_SAMPLES" in caught.value.issues[0].hint
