"""Masks, Dice and sites: the task that all segmentation sets build, on generated scans."""

from __future__ import annotations

import pytest
import torch

from xutrain import registry
from xutrain.data.base import Batch
from xutrain.data.segmentation import Scans, SegmentationTask
from xutrain.engine.evaluate import evaluate
from xutrain.engine.rng import Key


def _task(**options: object) -> SegmentationTask:
    cls = registry.load("dataset", "medical_synthetic")
    small = {"size": 16, "samples": [4, 5, 6], "val_samples": 2, "test_samples": 3}
    return cls.build(cls.Options(**{**small, **options}), 0)


def test_sites_and_splits() -> None:
    task = _task(unseen=1)
    assert task.synthetic and task.structures == ("target",) and task.num_classes == 1
    assert task.site_names == ("alder", "birch", "cedar", "grove") and task.unseen_sites == (3,)
    assert task.sites is not None and torch.bincount(task.sites).tolist() == [6, 7, 8]
    assert task.held_out is not None and int(task.held_out.sum()) == 6 and task.num_train == 21
    assert task.split_sites("test").tolist() == [s for s in range(4) for _ in range(3)]
    assert len(task.split_cases("test")) == len(set(task.split_cases("test"))) == 12
    assert sum(len(b) for b in task.batches("train", 4)) == 15 and sum(len(b) for b in task.batches("val", 4)) == 6
    inputs = torch.cat([b.inputs for b in task.batches("train", 4)])
    assert torch.equal(inputs, task.plain(torch.arange(21)[~task.held_out]).inputs)


def test_without_own_validation() -> None:
    task = _task(val_samples=0)
    assert task.held_out is None and task.num_train == 15


def test_samples_do_not_depend_on_counts_or_run_seed() -> None:
    few, many = _task(), _task(samples=[6, 7, 8])
    assert torch.equal(few.splits["test"].images, many.splits["test"].images)
    assert torch.equal(few.splits["train"].images[:4], many.splits["train"].images[:4])
    assert not torch.equal(few.splits["test"].images, _task(data_seed=1).splits["test"].images)


@pytest.mark.parametrize("options", [{"dims": 3}, {"structures": 2}, {"sites": 8}, {"shift": 0.0}])
def test_forms(options: dict[str, object]) -> None:
    task = _task(**options)
    dims = 3 if "dims" in options else 2
    assert task.input_shape == (1, *(16,) * dims)
    images, masks = task.scans.images, task.scans.masks
    assert images.min() >= 0 and images.max() <= 1 and set(masks.unique().tolist()) == {0, 1}
    assert bool((masks[:, -1].flatten(1).sum(1) > 0).all())
    if task.num_classes == 2:
        assert bool((masks[:, 0] >= masks[:, 1]).all())
        assert set(task.score(torch.zeros_like(masks, dtype=torch.float32), Batch(images, masks.float()))) > {"dice_target", "dice_objects"}


def test_dice_by_hand() -> None:
    """Empty truth counts for nothing, empty prediction is 0, threshold at logit 0, no smoothing; the loss has its constants."""
    truth = torch.zeros(3, 1, 2, 2)
    truth[0, 0, 0] = 1  # two pixels
    truth[1, 0, 0, 0] = 1
    logits = torch.full((3, 1, 2, 2), -20.0)
    logits[0, 0, :, 0] = 20.0  # one right, one wrong: 2 * 1 / (2 + 2)
    task = _task()
    batch = Batch(torch.zeros_like(truth), truth)
    assert task.score(logits, batch)["dice"] == (0.5, 2.0)
    expected = [1 - (2 + 1e-5) / (4 + 1e-5), 1 - 1e-5 / (1 + 1e-5), 1 - 1e-5 / 1e-5]
    assert task.losses(logits, batch).tolist() == pytest.approx(expected, abs=2e-3)
    assert float(task.loss(logits, batch)) == pytest.approx(sum(expected) / 3, abs=2e-3)


def test_dice_ce_adds_pixelwise_entropy() -> None:
    logits, truth = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 1, 4, 4)).float()
    batch = Batch(truth, truth)
    plain, both = _task(), _task(loss="dice_ce")
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    assert torch.allclose(both.loss(logits, batch), plain.loss(logits, batch) + entropy)


def test_augmentation_moves_image_and_mask_together() -> None:
    mask = (torch.rand(8, 1, 6, 6) < 0.3).to(torch.uint8)
    scans = Scans(mask.float(), mask, torch.zeros(8, dtype=torch.int64), ("a",) * 8)
    task = SegmentationTask("t", {"train": scans, "test": scans}, ("x",), ("s",), augment=True)
    batch = task.batch(torch.arange(8), Key(1))
    assert torch.equal(batch.inputs, batch.targets) and not torch.equal(batch.inputs, scans.images)
    assert torch.equal(batch.inputs, task.batch(torch.arange(8), Key(1)).inputs)


def test_patches_of_volumes() -> None:
    mask = torch.zeros(3, 1, 8, 8, 8, dtype=torch.uint8)
    mask[:, :, 2:4, 2:4, 2:4] = 1
    scans = Scans(mask.float(), mask, torch.zeros(3, dtype=torch.int64), ("a", "b", "c"))
    task = SegmentationTask("t", {"train": scans, "test": scans}, ("x",), ("s",), patch=(4, 4, 4))
    assert task.input_shape == (1, 4, 4, 4)
    batch = task.batch(torch.arange(3), Key(3))
    assert batch.inputs.shape == (3, 1, 4, 4, 4) and torch.equal(batch.inputs, batch.targets)
    assert next(iter(task.batches("test"))).inputs.shape == (3, 1, 8, 8, 8)


def test_trains() -> None:
    """A tiny U-Net learns the first site in a few steps, and evaluation is the mean over samples."""
    from xutrain.engine.context import Context

    torch.manual_seed(0)
    task = _task(sites=1, samples=24, size=16)
    net_class = registry.load("model", "unet")
    net = net_class.build(net_class.Options(channels=[8, 16], strides=[2], res_units=1), task)
    before = evaluate(net, task, "test", Context(0))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(20):
        batch = task.batch(torch.arange(8) + 8 * (step % 3), Key())
        optimizer.zero_grad()
        task.loss(net(batch.inputs), batch).backward()
        optimizer.step()
    after = evaluate(net, task, "test", Context(0))
    assert after["dice"] > before["dice"] + 0.1 and after["loss"] < before["loss"] - 0.1


def test_balls_that_cannot_fill_a_hundredth_of_a_volume_are_drawn_all_the_same() -> None:
    """At 18 pixels cedar's balls have 33 voxels, so two of them stay below 71; the target is there nevertheless."""
    task = _task(dims=3, size=18, objects=2, samples=1, val_samples=0, test_samples=1)
    assert bool(task.scans.masks.flatten(1).any(1).all())


def test_monai_comes_when_it_is_needed() -> None:
    """Options are checked, and help is shown, without it: it takes seconds to import."""
    import subprocess
    import sys

    parts = [("dataset", f"medical_{name}") for name in ("synthetic", "brains", "datalists")] + [("model", "unet")]
    code = (
        f"import sys\nfrom xutrain import registry\nfor kind, name in {parts!r}: registry.load(kind, name).Options\n"
        "import xutrain.data.prostate_files, xutrain.data.fundus_files, xutrain.models.selector\nassert 'monai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
