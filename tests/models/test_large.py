"""The architectures of the papers: closed-form parameter counts, chains, gradients, wrong options."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from shaped_models import build, check_chain, count

from xutrain.errors import RecipeError
from xutrain.models.decoder import Decoder
from xutrain.models.moe import Architecture


def conv(a: int, b: int, k: int) -> int:
    return a * b * k * k


def pre_activation(widths: list[int], blocks: int, bottleneck: bool, stem: int, classes: int = 10) -> int:
    """Parameters of a pre-activation network, counted by hand: each batch norm has two a channel."""
    total, before = conv(3, stem, 3), stem
    for after in widths:
        for _ in range(blocks):
            inner = after // 4 if bottleneck else after
            if bottleneck:
                total += 2 * before + conv(before, inner, 1) + 2 * inner + conv(inner, inner, 3) + 2 * inner + conv(inner, after, 1)
            else:
                total += 2 * before + conv(before, after, 3) + 2 * after + conv(after, after, 3)
            # the first block of a stage has stride 2 or more channels than its input
            total += conv(before, after, 1) if before != after else 0
            before = after
    return total + 2 * before + before * classes + classes


def densenet(growth: int, blocks: list[int], classes: int = 10) -> int:
    channels = 2 * growth
    total = conv(3, channels, 3)
    for b, n in enumerate(blocks):
        for _ in range(n):
            total += 2 * channels + conv(channels, 4 * growth, 1) + 8 * growth + conv(4 * growth, growth, 3)
            channels += growth
        if b + 1 < len(blocks):
            total += 2 * channels + conv(channels, channels // 2, 1)
            channels //= 2
    return total + 2 * channels + channels * classes + classes


def vgg16_features() -> int:
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return sum(conv(a, b, 3) + 3 * b for a, b in pairwise(widths))  # weight, bias, batch norm


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("vgg", {}, vgg16_features() + 2 * (512 * 512 + 512) + 5130),
        ("vgg", {}, 15_253_578),
        ("vgg", {"classifier": []}, 14_728_266),
        ("wide_resnet", {}, 36_479_194),
        ("wide_resnet", {"depth": 16, "widen": 4}, pre_activation([64, 128, 256], 2, False, 16)),
        ("preresnet", {}, pre_activation([16, 32, 64], 9, False, 16)),
        ("preresnet", {"depth": 164}, pre_activation([64, 128, 256], 18, True, 16)),
        ("densenet_cifar", {}, 1_000_618),
        ("densenet_cifar", {"growth": 5, "blocks": [2, 3]}, densenet(5, [2, 3])),
        ("googlenet_cifar", {}, 6_166_250),
        ("resnext_cifar", {}, 34_426_698),
        ("torchvision_resnet", {"depth": 18, "stem": "small"}, 11_173_962),
    ],
)
def test_parameter_counts(name: str, options: dict[str, Any], want: int) -> None:
    assert count(build(name, **options)) == want


def test_formula_of_densenet_is_the_known_count() -> None:
    assert densenet(12, [6, 12, 24, 16]) == 1_000_618


SMALL = [
    ("preresnet", {"depth": 14, "width": 4}, (3, 32, 32)),
    ("preresnet", {"depth": 20, "block": "bottleneck", "width": 4}, (1, 8, 8)),
    ("wide_resnet", {"depth": 10, "widen": 1, "dropout": 0.3}, (3, 32, 32)),
    ("vgg", {"depth": 11, "classifier": [32]}, (3, 32, 32)),
    ("vgg", {"depth": 11, "batch_norm": False, "dropout": 0.0}, (1, 64, 32)),
    ("vgg", {"depth": 11, "norm": "group"}, (3, 32, 32)),
    ("resnet_cifar", {"depth": 8, "width": 8, "norm": "group", "shortcut": "B"}, (3, 16, 16)),
    ("googlenet_cifar", {}, (3, 16, 16)),
    ("densenet_cifar", {"growth": 4, "blocks": [2, 2, 2]}, (3, 32, 32)),
    ("resnext_cifar", {"depth": 11, "cardinality": 2, "base_width": 4}, (3, 16, 16)),
    ("torchvision_resnet", {"depth": 18}, (1, 28, 28)),
    ("torchvision_resnet", {"depth": 18, "stem": "small"}, (3, 8, 8)),
]


@pytest.mark.parametrize(("name", "options", "shape"), SMALL)
def test_layers_compose_to_the_forward_pass(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check_chain(build(name, shape, **options), shape)


def test_torchvision_checkpoints_fit() -> None:
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=7).eval()
    ours = build("torchvision_resnet", (3, 64, 64), 7, depth=18).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["vgg", "resnet_cifar"])
def test_group_norm_looks_at_one_sample_and_keeps_no_statistics(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, norm="group", depth={"vgg": 11, "resnet_cifar": 8}[name], **({"dropout": 0.0} if name == "vgg" else {})).train()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)
    assert not list(net.buffers())
    with_batch = build(name, depth={"vgg": 11, "resnet_cifar": 8}[name])
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in with_batch.parameters())


def test_vgg_init_is_that_of_the_papers() -> None:
    torch.manual_seed(0)
    net = dict(build("vgg", depth=11).named_parameters())
    assert abs(net["conv5_2.weight"].std() / (2 / (9 * 512)) ** 0.5 - 1) < 0.01 and not net["conv5_2.bias"].any()


def test_dropout_is_a_function_of_the_global_generator() -> None:
    net = build("vgg", depth=11, batch_norm=False).train()
    x = torch.randn(2, 3, 32, 32)

    def out(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return net(x)

    assert torch.equal(out(1), out(1)) and not torch.equal(out(1), out(2))


@pytest.mark.parametrize(
    ("name", "shape", "options", "match"),
    [
        (
            "resnet_cifar",
            (3, 8, 8),
            {"norm": "group", "norm_group": 5},
            r"model\.norm_group: does not divide a layer of 16 channels \(got 5\)",
        ),
        ("preresnet", (3, 32, 32), {"depth": 57}, r"model\.depth: must be 6n\+2 with basic blocks \(got 57\)"),
        ("preresnet", (3, 32, 32), {"depth": 168}, r"model\.depth: must be 9n\+2 with bottleneck"),
        ("wide_resnet", (3, 32, 32), {"depth": 20}, r"model\.depth: must be 6n\+4"),
        ("resnext_cifar", (3, 32, 32), {"depth": 30}, r"model\.depth: must be 9n\+2"),
        ("vgg", (1, 28, 28), {}, r"model\.name: needs images of at least 32x32"),
        ("vgg", (784,), {}, r"model\.name: takes images"),
    ],
)
def test_impossible_options_name_the_key(name: str, shape: tuple[int, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        build(name, shape, **options)


def test_a_decoder_starts_from_its_generator_alone() -> None:
    """Qwen's attention has biases, which are drawn from no global state."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 32, "moe_intermediate_size": 8, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = {"model_type": "qwen2_moe", **sizes, **heads, "shared_expert_intermediate_size": 8, "rms_norm_eps": 1e-6}
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(Decoder(Architecture.of(config)))
        made[-1].initialise(torch.Generator().manual_seed(3))
    first, second = (m.state_dict() for m in made)
    assert any(name.endswith(".bias") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
