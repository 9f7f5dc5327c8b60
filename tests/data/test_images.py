"""Image tasks in memory: keyed augmentation, normalisation, splits and subsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xutrain.data.base import Task
from xutrain.data.digits import Digits
from xutrain.data.images import ImageOptions, ImageTask, Pixels, divide, hold_out
from xutrain.data.synthetic_images import SyntheticImages
from xutrain.engine.rng import key
from xutrain.errors import RecipeError


def coloured(n: int = 40, size: int = 6, *, pad: int = 0, flip: bool = False) -> ImageTask:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (n, 3, size, size), dtype=np.uint8)
    pixels = Pixels.of(images, np.arange(n) % 4)
    return ImageTask("tiny", {"train": pixels, "test": pixels}, 4, mean=(0.5, 0.25, 0.125), std=(0.5, 1.0, 2.0), pad=pad, flip=flip)


def test_normalisation_is_by_channel() -> None:
    task = coloured()
    raw = task.splits["train"].images[3].double() / 255
    want = (raw - torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    got = task.batch(torch.tensor([3]), key()).inputs[0]
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, atol=1e-6)


def test_crop_and_flip_equal_the_loop_over_samples() -> None:
    task, k, n = coloured(pad=2, flip=True), key(5, "augment", 7, 2), 40
    got = task.batch(torch.arange(n), k).inputs
    offsets = (k.fold(stream="crop").uniform(2 * n) * 5).long()
    mirrored = k.fold(stream="flip").uniform(n) < 0.5
    for i in range(n):
        image = torch.nn.functional.pad(task.splits["train"].images[i], (2, 2, 2, 2))
        image = image[:, offsets[i] : offsets[i] + 6, offsets[n + i] : offsets[n + i] + 6]
        image = image.flip(-1) if mirrored[i] else image
        assert torch.equal(got[i], task._normal(image[None])[0])
    assert mirrored.any() and not mirrored.all() and offsets.min() == 0 and offsets.max() == 4


def test_augmentation_depends_on_the_key_alone_and_spares_evaluation() -> None:
    task = coloured(pad=2, flip=True)
    rows = torch.arange(16)
    first = task.batch(rows, key(1, "a")).inputs
    torch.rand(3)
    assert torch.equal(first, task.batch(rows, key(1, "a")).inputs)
    assert not torch.equal(first, task.batch(rows, key(2, "a")).inputs)
    plain = torch.cat([b.inputs for b in task.batches("train", 7)])
    assert torch.equal(plain, coloured().batch(torch.arange(40), key()).inputs)


def test_draw_covers_an_epoch_once() -> None:
    task = coloured()
    seen = torch.cat([task.draw(step, w, 2, 5, seed=3).targets for step in range(4) for w in range(2)])
    assert torch.equal(torch.bincount(seen), torch.bincount(task.labels))


def test_splits_do_not_overlap_and_ignore_the_run_seed() -> None:
    options = Digits.Options(val_fraction=0.1)
    task = Digits.build(options, 0)
    sizes = {s: sum(len(b) for b in task.batches(s)) for s in ("train", "val", "test")}
    assert sizes == {"train": 1293, "val": 144, "test": 360} and task.num_train == 1293
    train, test = hold_out(1797, 0.2, 0)
    assert sorted([*train, *test]) == list(range(1797))
    assert torch.equal(task.labels, Digits.build(options, 99).labels)
    assert not torch.equal(task.labels, Digits.build(Digits.Options(val_fraction=0.1, data_seed=1), 0).labels)


def test_digits_are_the_real_set() -> None:
    task = Digits.build(Digits.Options(), 0)
    inputs = torch.cat([b.inputs for s in ("train", "test") for b in task.batches(s)])
    assert inputs.shape == (1797, 1, 8, 8) and abs(inputs.mean()) < 0.01 and abs(inputs.std() - 1) < 0.01
    assert isinstance(task, Task) and not task.synthetic and task.num_classes == 10 and task.input_shape == (1, 8, 8)


def test_subsets_are_drawn_once() -> None:
    task = Digits.build(Digits.Options(subset=200, test_subset=50), 0)
    assert task.num_train == len(task.labels) == 200 and len(task.splits["test"]) == 50
    assert (torch.bincount(task.labels, minlength=10) > 5).all()


@pytest.mark.parametrize("bad", [{"subset": 1438}, {"test_subset": 361}])
def test_a_subset_larger_than_the_set_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=rf"data.{next(iter(bad))}: more samples .* .got {next(iter(bad.values()))}"):
        Digits.build(Digits.Options(**bad), 0)


def test_subset_is_read_through_a_memory_map(tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100 * 3 * 4 * 4, dtype=np.uint8).reshape(100, 3, 4, 4))
    images = np.load(tmp_path / "x.npy", mmap_mode="r")
    splits = divide((images, np.arange(100)), (images, np.arange(100)), ImageOptions(name="x", subset=7))
    rows = splits["train"].labels
    assert torch.equal(splits["train"].images, torch.from_numpy(np.array(images[rows.numpy()])))


def test_synthetic_twin_is_labelled_seeded_and_learnable() -> None:
    options = SyntheticImages.Options(classes=5, size=16, channels=1, samples=300, augment=True)
    task = SyntheticImages.build(options, 0)
    assert task.synthetic and task.input_shape == (1, 16, 16) and task.pad == 2
    assert torch.bincount(task.labels).tolist() == [60] * 5
    again = SyntheticImages.build(options, 1)
    assert torch.equal(task.splits["train"].images, again.splits["train"].images)
    train, test = task.splits["train"], task.splits["test"]
    means = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(5)])
    nearest = (test.images.float()[:, None] - means).flatten(2).norm(dim=2).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.8


@pytest.mark.parametrize("bad", ["val_fraction", "test_fraction"])
def test_a_split_that_leaves_no_training_sample_is_refused(bad: str) -> None:
    with pytest.raises(RecipeError, match=rf"data.{bad}: leaves no training sample"):
        Digits.build(Digits.Options(**{bad: 0.9999}), 0)
