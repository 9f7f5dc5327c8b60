"""The small networks: closed-form parameter counts, chains, wrong inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shaped_models import build, check_chain, count

from xutrain.errors import RecipeError


@pytest.mark.parametrize(
    ("name", "shape", "options", "want"),
    [
        ("mlp", (1, 8, 8), {"hidden": [64, 64, 64]}, 3 * (64 * 64 + 64) + 650),
        ("mlp", (784,), {"hidden": [128]}, 784 * 128 + 128 + 1290),
        ("linear", (1, 28, 28), {}, 7850),
        ("cnn", (1, 28, 28), {}, 160 + 4640 + 1568 * 64 + 64 + 650),
        ("resnet_cifar", (3, 32, 32), {"depth": 20}, 269_722),
        ("resnet_cifar", (3, 32, 32), {"depth": 56}, 853_018),
        ("resnet_cifar", (3, 32, 32), {"depth": 110}, 1_727_962),
        ("resnet_cifar", (3, 32, 32), {"depth": 20, "shortcut": "B"}, 269_722 + 16 * 32 + 64 + 32 * 64 + 128),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], options: dict[str, Any], want: int) -> None:
    assert count(build(name, shape, **options)) == want


def test_mlp_without_hidden_layers_is_the_linear_model() -> None:
    torch.manual_seed(0)
    one = build("mlp", (1, 4, 4), hidden=[])
    torch.manual_seed(0)
    two = build("linear", (1, 4, 4))
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize(("name", "options"), [("mlp", {"dropout": 0.5}), ("cnn", {}), ("resnet_cifar", {"depth": 14, "width": 4})])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_layers_compose_to_the_forward_pass(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    check_chain(build(name, shape, **options), shape)


def test_initial_weights_come_from_the_global_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(build("resnet_cifar", depth=8).parameters())

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_resnet_init_is_fan_out_normal() -> None:
    torch.manual_seed(0)
    weight = dict(build("resnet_cifar").named_parameters())["stage3.1.conv2.weight"]
    assert abs(weight.std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.02


def test_impossible_options_name_the_key() -> None:
    with pytest.raises(RecipeError, match=r"model.depth: must be 6n\+2 \(got 21\)"):
        build("resnet_cifar", depth=21)
    with pytest.raises(RecipeError, match=r"model\.channels"):
        build("cnn", (1, 4, 4), channels=[4, 4, 4])
    with pytest.raises(RecipeError, match=r"model\.name: takes images"):
        build("resnet_cifar", (128,))
