"""The communication hook on real DDP over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # DDP imports it; once here instead of in every forked process
from torch import Tensor, nn

import xutrain
from xutrain.errors import RecipeError, UsageError
from xutrain.hooks import CompressedHook

STEPS, MU, WD = 6, 0.9, 0.0


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g)


def rate(step: int) -> float:
    return 0.1 if step < 3 else 0.02


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def train(
    codec: str, options: dict[str, Any], cap_mb: float, hooked: dict[str, Any], steps: tuple[int, int] = (0, STEPS), state: Any = None
) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    module = model()
    if state:
        module.load_state_dict(state[rank]["model"])
    ddp = DistributedDataParallel(module, bucket_cap_mb=cap_mb)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.0 if hooked.get("momentum") else MU)
    hook = CompressedHook(ddp, xutrain.codec(codec, **options), optimizer=optimizer, **hooked).attach()
    if state:
        hook.load_state_dict(state[rank]["hook"])
        optimizer.load_state_dict(state[rank]["optimizer"])
    for step in range(*steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        with hook.detached():
            inputs, targets = batch(step, rank)
            nn.functional.cross_entropy(ddp(inputs), targets).backward()
        optimizer.step()
    return {
        "x": flat(module),
        "model": module.state_dict(),
        "hook": hook.state_dict(),
        "optimizer": optimizer.state_dict(),
        "bits": hook.bits,
    }


def single(coeff: float, codec: Any, ranks: int = 2, momentum: bool = True) -> Tensor:
    """The same mathematics in one process without DDP: DEF with local momenta, or PEF."""
    from xutrain.engine.rng import Key

    module = model()
    x = flat(module)
    e, m, after = [torch.zeros_like(x) for _ in range(ranks)], [torch.zeros_like(x) for _ in range(ranks)], torch.zeros_like(x)
    for step in range(STEPS):
        for k in range(ranks):
            torch.nn.utils.vector_to_parameters(x - coeff * e[k], module.parameters())
            module.zero_grad()
            inputs, targets = batch(step, k)
            nn.functional.cross_entropy(module(inputs), targets).backward()
            g = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
            m[k] = MU * m[k] + g
            e[k] = e[k] + rate(step) * (m[k] if momentum else g)
        c = sum(codec.decode(codec.encode(v, Key(0, "hook", step))) for v in e) / ranks
        e = [v - codec.decode(codec.encode(v, Key(0, "hook", step))) for v in e]
        after = MU * after + c / rate(step)
        x = x - (c if momentum else rate(step) * after)
    return x


def laid(name: str, **options: Any) -> Any:
    from xutrain.hooks import slices

    built = xutrain.codec(name, **options)
    built.lay(slices(list(model().named_parameters())))
    return built


@pytest.mark.parametrize("coeff", [0.0, 0.3])
def test_def_in_someone_elses_loop(coeff: float, forked: Callable[..., list[Any]]) -> None:
    """Any bucket size gives DEF's trajectory; the draw belongs to the parameter, and a changed lr needs no rescaling."""
    expected = single(coeff, laid("random_block", ratio=8))
    for cap in (25.0, 0.001):
        results = forked(train, 2, "random_block", {"ratio": 8}, cap, {"momentum": MU, "coeff": coeff})
        assert torch.equal(results[0]["x"], results[1]["x"])
        assert torch.allclose(results[0]["x"], expected, atol=1e-6)
        assert results[0]["bits"] == STEPS * laid("random_block", ratio=8).payload_bits(flat(model()).numel())


def test_momentum_after_the_reduction_is_pef(forked: Callable[..., list[Any]]) -> None:
    results = forked(train, 2, "top_k", {"ratio": 8}, 25.0, {})
    assert torch.equal(results[0]["x"], results[1]["x"])
    reference = single(0.0, laid("top_k", ratio=8), momentum=False)
    assert torch.allclose(results[0]["x"], reference, atol=1e-5)


@pytest.mark.parametrize(
    ("codec", "options", "hooked"),
    [
        ("fp", {}, {}),
        ("orq", {"levels": 9}, {"error_feedback": False}),
        ("scaled_sign", {"scope": "tensor"}, {}),
        ("low_rank", {"rank": 1}, {}),
        ("random_k", {"ratio": 4}, {"momentum": MU, "coeff": 1.0}),
    ],
)
def test_any_codec_and_a_resume(codec: str, options: dict[str, Any], hooked: dict[str, Any], forked: Callable[..., list[Any]]) -> None:
    """Ranks agree bit for bit, and a resumed run goes on as if never stopped although DDP's buckets start anew."""
    whole = forked(train, 2, codec, options, 25.0, hooked)
    assert torch.equal(whole[0]["x"], whole[1]["x"])
    half = forked(train, 2, codec, options, 25.0, hooked, (0, 3))
    rest = forked(train, 2, codec, options, 25.0, hooked, (3, STEPS), half)
    assert torch.equal(rest[0]["x"], whole[0]["x"]) or codec == "orq" or torch.allclose(rest[0]["x"], whole[0]["x"], atol=1e-6)
    if codec == "fp":
        assert torch.allclose(whole[0]["x"], single(0.0, laid("fp"), momentum=False), atol=1e-6)


def test_mean_state_keeps_the_mean_residual() -> None:
    states = [{"step": 3, "error": {"w": torch.full((2,), float(k))}, "velocity": {}, "codec": {}} for k in range(4)]
    mean = CompressedHook.mean_state(states)
    assert mean["step"] == 3 and torch.equal(mean["error"]["w"], torch.full((2,), 1.5))


def test_bad_input() -> None:
    for wrong in ({"coeff": 1.5}, {"momentum": 1.0}):
        with pytest.raises(UsageError):
            CompressedHook(model(), xutrain.codec("fp"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="grow"):
        CompressedHook(model(), xutrain.codec("random_k", ratio=8, rescale=True))
    with pytest.raises(RecipeError, match=r"codec\.ratio"):
        CompressedHook(model(), xutrain.codec("random_block", ratio=1000))
