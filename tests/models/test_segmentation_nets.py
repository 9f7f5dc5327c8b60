"""The U-Net and the selectors: exact sizes, shapes, what they refuse."""

from __future__ import annotations

import pytest
import torch

from xutrain import registry
from xutrain.data.base import Task
from xutrain.errors import RecipeError
from xutrain.models.selector import build_selector, check_selector, slices_of, vote


def _task(shape: tuple[int, ...], outputs: int = 1) -> Task:
    task = Task()
    task.name, task.input_shape, task.num_classes, task.num_train = "tiny", shape, outputs, 4
    task.structures = ("x",) * outputs  # type: ignore[attr-defined]
    return task


def _unet(task: Task, **options: object) -> torch.nn.Module:
    cls = registry.load("model", "unet")
    return cls.build(cls.Options(**options), task)


def _size(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_exact_size() -> None:
    net = _unet(_task((1, 32, 32)))
    assert _size(net) == 1_624_844 and len(list(net.parameters())) == 63 and not list(net.buffers())
    assert _size(_unet(_task((3, 32, 32), 2))) == 1_625_737


@pytest.mark.parametrize("shape", [(2, 16, 24), (1, 8, 16, 16)])
def test_shapes(shape: tuple[int, ...]) -> None:
    net = _unet(_task(shape, 2), channels=[4, 8, 8], strides=[2, 2])
    assert net(torch.zeros(3, *shape)).shape == (3, 2, *shape[1:])


def test_batch_norm_has_statistics() -> None:
    assert list(_unet(_task((1, 16, 16)), channels=[4, 8], strides=[2], norm="batch").buffers())


def test_sliding_window() -> None:
    """Evaluation of larger inputs goes piece by piece; a pointwise net must give the same as in one piece."""
    task = _task((1, 8, 8, 8))
    torch.manual_seed(0)
    net = _unet(task, channels=[4, 8], strides=[2], window=[8, 8, 8]).eval()
    assert net(torch.zeros(1, 1, 16, 8, 12)).shape == (1, 1, 16, 8, 12)
    inside = torch.randn(2, 1, 8, 8, 8)
    assert torch.equal(net(inside), net.net(inside))  # type: ignore[operator]
    assert net(torch.zeros(1, 1, 7, 5, 3)).shape == (1, 1, 7, 5, 3)
    net.net = torch.nn.Conv3d(1, 1, 1)
    large = torch.randn(1, 1, 12, 8, 20)
    assert torch.allclose(net(large), net.net(large), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "where"),
    [
        ((1, 30, 32), {}, "data.size"),
        ((1, 20, 32, 32), {}, "data.size"),
        ((1, 16, 16, 16), {}, "data.size"),
        ((1, 32, 32), {"strides": [2, 2]}, "model.strides"),
        ((1, 32, 32), {"window": [16, 16, 16]}, "model.window"),
        ((1, 32, 32), {"window": [8, 32]}, "model.window"),
    ],
)
def test_refuses(shape: tuple[int, ...], options: dict[str, object], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _unet(_task(shape), **options)
    assert caught.value.issues[0].where == where


def test_refuses_a_task_without_masks() -> None:
    task = _task((1, 32, 32))
    del task.structures  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="no masks"):
        _unet(task)


def test_selectors() -> None:
    with torch.device("meta"):
        assert _size(build_selector("vgg11", 1, 2, 3)) == 128_777_475
    small = build_selector("small", 1, 3, 4)
    assert 100_000 <= _size(small) <= 1_000_000
    assert small(torch.rand(2, 1, 16, 20)).shape == (2, 4)
    for kind in ("vgg11", "small"):
        check_selector(kind, (32, 32))  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="at least"):
            check_selector(kind, (64, 12))  # type: ignore[arg-type]


def test_volumes_are_judged_by_their_slices() -> None:
    small = build_selector("small", 1, 3, 3)
    volumes = torch.rand(2, 1, 5, 16, 16)
    each = torch.softmax(small(slices_of(volumes)), 1).view(2, 5, 3)
    assert torch.allclose(vote(small, volumes), each.mean(1)) and torch.allclose(vote(small, volumes).sum(1), torch.ones(2))
    assert torch.equal(slices_of(volumes)[5:], volumes[1, 0][:, None])
    assert torch.equal(slices_of(volumes, torch.tensor([1, 3])), volumes[:, 0, [1, 3]].reshape(4, 1, 16, 16))
    images = torch.rand(3, 1, 16, 16)
    assert slices_of(images) is images and torch.allclose(vote(small, images), torch.softmax(small(images), 1))


def test_whole_volumes_must_fit_unless_there_is_a_window() -> None:
    from xutrain.data.segmentation import Scans, SegmentationTask

    mask = torch.ones(2, 1, 10, 16, 16, dtype=torch.uint8)
    scans = Scans(mask.float(), mask, torch.zeros(2, dtype=torch.int64), ("a", "b"))
    task = SegmentationTask("t", {"train": scans, "test": scans}, ("x",), ("s",), patch=(8, 8, 8))
    options = {"channels": [4, 8, 8], "strides": [2, 2]}
    with pytest.raises(RecipeError, match=r"data\.size.*multiples of 4"):
        _unet(task, **options)
    assert _unet(task, **options, window=[8, 8, 8]).eval()(scans.images).shape == (2, 1, 10, 16, 16)
