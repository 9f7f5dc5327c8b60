"""Every form of every set decodes to the same arrays; a damaged file is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny_sets

from xutrain.data import cifar_files, folder_files, idx_files, store, svhn_files
from xutrain.data.store import Pin
from xutrain.errors import DataError


def same(content: store.Content, arrays: tiny_sets.Arrays) -> bool:
    return content.keys() == arrays.keys() and all(
        np.array_equal(content[k], v) and content[k].dtype == np.uint8 for k, v in arrays.items()
    )


@pytest.mark.parametrize("form", ["pickled", "binary", "png_rows"])
def test_cifar10_from_a_folder(tmp_path: Path, form: str) -> None:
    arrays = tiny_sets.cifar()
    assert same(cifar_files.read("cifar10", getattr(tiny_sets, form)(tmp_path / "set", arrays)), arrays)


@pytest.mark.parametrize("form", ["pickled", "binary", "png_rows"])
def test_cifar10_from_an_archive_and_from_a_folder_with_the_archive(tmp_path: Path, form: str) -> None:
    arrays = tiny_sets.cifar()
    archive = tiny_sets.tarball(tmp_path / "cifar.tar.gz", getattr(tiny_sets, form)(tmp_path / "x" / "set", arrays))
    assert same(cifar_files.read("cifar10", archive), arrays)
    (tmp_path / "y").mkdir()
    archive.rename(tmp_path / "y" / archive.name)
    assert same(cifar_files.read("cifar10", tmp_path / "y"), arrays)


def test_cifar10_from_parquet_in_another_order(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    arrays = tiny_sets.cifar()
    shuffled = cifar_files.read("cifar10", tiny_sets.parquet(tmp_path / "set", arrays, [4, 3, 2, 5, 1]))
    assert not same(shuffled, arrays) and same(store.restore_order(shuffled, pins(arrays)), arrays)


def test_pictures_of_another_size_are_named() -> None:
    """64x64 pixels are a multiple of 32x32, and still no CIFAR."""
    picture = np.arange(32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    assert np.array_equal(cifar_files._stacked("x", [picture])[0], picture.transpose(2, 0, 1))
    assert cifar_files._stacked("x", []).shape == (0, 3, 32, 32)
    with pytest.raises(DataError, match=r"x\.parquet: damaged .* image of 64x64 pixels"):
        cifar_files._stacked("x.parquet", [picture, np.zeros((64, 64, 3), np.uint8)])


def pins(arrays: tiny_sets.Arrays, rows: int = 4) -> dict[str, Pin]:
    made = {k: Pin(dtype="uint8", shape=list(v.shape), sha256=store.checksum(v)) for k, v in arrays.items()}
    blocks = [store.checksum(arrays["train_images"][i : i + rows]) for i in range(0, 5 * rows, rows)]
    made["train_images"] = made["train_images"].model_copy(update={"block_rows": rows, "blocks": blocks})
    return made


def test_blocks_in_another_order_are_put_right_and_others_left_alone() -> None:
    arrays = tiny_sets.cifar()
    rows = np.concatenate([np.arange(4) + 4 * b for b in (3, 0, 4, 1, 2)])
    moved = {k: v[rows] if k.startswith("train") else v for k, v in arrays.items()}
    assert same(store.restore_order(moved, pins(arrays)), arrays)
    other = {**arrays, "train_images": arrays["train_images"][::-1]}
    assert store.restore_order(other, pins(arrays)) is other


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, fine = rng.integers(0, 256, (6, 3072), dtype=np.uint8), [0, 99, 5, 7, 42, 1]
    (tmp_path / "p").mkdir()
    (tmp_path / "b").mkdir()
    for role in ("train", "test"):
        batch = {b"data": rows, b"fine_labels": fine, b"coarse_labels": [3] * 6}
        (tmp_path / "p" / role).write_bytes(pickle.dumps(batch, protocol=2))
        lead = np.array([[3, f] for f in fine], dtype=np.uint8)
        (tmp_path / "b" / f"{role}.bin").write_bytes(np.hstack([lead, rows]).tobytes())
    for folder in ("p", "b"):
        content = cifar_files.read("cifar100", tmp_path / folder)
        assert content["train_labels"].tolist() == fine and np.array_equal(content["test_images"].reshape(6, -1), rows)


class Evil:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        import os

        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps({b"data": Evil(), b"labels": []}), "posix.system"),
        (pickle.dumps({b"data": Path("x"), b"labels": []}), "which a CIFAR batch has no use for"),
        (pickle.dumps([1, 2]), "a list instead of a dictionary"),
        (pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}), "no uint8 rows of 3072"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images and labels of shape"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}), "labels are not integers from 0 to 9"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]})[:-50], "truncated|ran out|out of range|end"),
        (b"", "Ran out of input|EOF"),
        (b"\x80\x04garbage", "truncated"),
    ],
)
def test_a_bad_pickle_is_named_and_nothing_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sets.pickled(tmp_path / "set", tiny_sets.cifar())
    (tmp_path / "set" / "data_batch_3").write_bytes(data)
    with pytest.raises(DataError, match=rf"(?s)data_batch_3: damaged or not.*({reason})") as caught:
        cifar_files.read("cifar10", tmp_path / "set")
    assert caught.value.exit_code == 3 and not (tmp_path / "pwned").exists()


def test_pickles_of_a_new_python_are_read(tmp_path: Path) -> None:
    """Protocols above 2 keep bytes and arrays in other ways."""
    arrays = tiny_sets.cifar()
    tiny_sets.pickled(tmp_path / "set", arrays)
    for name, (images, labels) in tiny_sets.batches(arrays).items():
        batch = {"data": images.reshape(len(images), -1), "labels": labels.astype(np.int64)}
        (tmp_path / "set" / name).write_bytes(pickle.dumps(batch, protocol=4))
    assert same(cifar_files.read("cifar10", tmp_path / "set"), arrays)


def test_damaged_archives_and_files_are_named(tmp_path: Path) -> None:
    arrays = tiny_sets.cifar()
    archive = tiny_sets.tarball(tmp_path / "cifar.tar.gz", tiny_sets.pickled(tmp_path / "a" / "set", arrays))
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"cifar\.tar\.gz: damaged"):
        cifar_files.read("cifar10", archive)
    archive.write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"cifar\.tar\.gz: damaged"):
        cifar_files.read("cifar10", archive)
    folder = tiny_sets.binary(tmp_path / "b", arrays)
    (folder / "test_batch.bin").write_bytes((folder / "test_batch.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin: damaged .*no multiple of 3073"):
        cifar_files.read("cifar10", folder)
    folder = tiny_sets.png_rows(tmp_path / "c", arrays)
    (folder / "data_batch_2.png").write_bytes((folder / "data_batch_2.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"data_batch_2\.png: damaged"):
        cifar_files.read("cifar10", folder)
    with pytest.raises(DataError, match=r"holds no cifar10 .* nothing of it"):
        (tmp_path / "empty").mkdir()
        cifar_files.read("cifar10", tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        cifar_files.read("cifar10", tmp_path / "nowhere")


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist(tmp_path: Path, zipped: bool) -> None:
    folder, arrays = tiny_sets.idx(tmp_path / "set", zipped=zipped)
    assert same(idx_files.read("fashion_mnist", folder), arrays)


@pytest.mark.parametrize(("keep", "reason"), [(-7, "damaged"), (0, "damaged"), (9, "damaged")])
def test_a_truncated_idx_file_is_named(tmp_path: Path, keep: int, reason: str) -> None:
    folder, _ = tiny_sets.idx(tmp_path / "set")
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte\.gz: {reason}"):
        idx_files.read("fashion_mnist", folder)


def test_a_missing_or_wrong_idx_file_is_named(tmp_path: Path) -> None:
    folder, _ = tiny_sets.idx(tmp_path / "set", zipped=False)
    (folder / "t10k-images-idx3-ubyte").write_bytes((folder / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte: damaged .*3 axes"):
        idx_files.read("fashion_mnist", folder)
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="test images or labels of fashion_mnist are not there"):
        idx_files.read("fashion_mnist", folder)


def test_svhn(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="MATLAB files need scipy")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8), np.array([[1], [10], [9], [10], [5], [2]], dtype=np.uint8)
    for role in ("train", "test"):
        io.savemat(tmp_path / f"{role}_32x32.mat", {"X": images, "y": labels}, do_compression=True)
    content = svhn_files.read("svhn", tmp_path)
    assert content["train_labels"].tolist() == [1, 0, 9, 0, 5, 2] and content["test_images"].shape == (6, 3, 32, 32)
    assert np.array_equal(content["train_images"][4], images[:, :, :, 4].transpose(2, 0, 1))
    whole = (tmp_path / "test_32x32.mat").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"MATLAB 5.0 nothing"):
        (tmp_path / "test_32x32.mat").write_bytes(broken)
        with pytest.raises(DataError, match=r"test_32x32\.mat: damaged"):
            svhn_files.read("svhn", tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"test_32x32\.mat is not there"):
        svhn_files.read("svhn", tmp_path)


def test_image_folder_layout_is_checked(tmp_path: Path) -> None:
    folder = tiny_sets.image_folder(tmp_path / "set")
    assert folder_files.read("imagenet", folder).facts == {"classes": 3, "train": 12, "val": 6}
    (folder / "val" / "n0002").rename(folder / "val" / "n0009")
    with pytest.raises(DataError, match="different classes, for example"):
        folder_files.read("imagenet", folder)
    with pytest.raises(DataError, match=r"train: no such folder .*|no such folder"):
        folder_files.read("imagenet", tmp_path)
