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


def single(coeff: float | str, codec: Any, ranks: int = 2, momentum: bool = True) -> Tensor:
    """The same mathematics in one process without DDP: DEF with local momenta, or PEF."""
    from xutrain.engine.rng import Key

    adaptive, moments = coeff == "adaptive", [0.0, 0.0]
    coeff = 1.0 if isinstance(coeff, str) else coeff
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
        sent = torch.stack([codec.decode(codec.encode(v, Key(0, "hook", step))) for v in e])
        c = sent.mean(0)
        if adaptive:  # M and V of the block, each with an average of its own
            spread = float((sent - c).square().sum()) / ranks
            moments = [0.95 * old + 0.05 * new for old, new in zip(moments, (float(c.square().sum()), spread), strict=True)]
            coeff = moments[0] / sum(moments)
        e = [v - codec.decode(codec.encode(v, Key(0, "hook", step))) for v in e]
        after = MU * after + c / rate(step)
        x = x - (c if momentum else rate(step) * after)
    return x


def laid(name: str, **options: Any) -> Any:
    from xutrain.hooks import slices

    built = xutrain.codec(name, **options)
    built.lay(slices(list(model().named_parameters())))
    return built


@pytest.mark.parametrize("coeff", [0.0, 0.3, "adaptive"])
def test_def_in_someone_elses_loop(coeff: float | str, forked: Callable[..., list[Any]]) -> None:
    """Any bucket size gives DEF's trajectory; the draw belongs to the parameter, and a changed lr needs no rescaling."""
    expected = single(coeff, laid("random_block", ratio=8))
    for cap in (25.0, 0.001):
        results = forked(train, 2, "random_block", {"ratio": 8}, cap, {"momentum": MU, "coeff": coeff})
        assert torch.equal(results[0]["x"], results[1]["x"])
        assert torch.allclose(results[0]["x"], expected, atol=1e-6)
        payload = STEPS * laid("random_block", ratio=8).payload_bits(flat(model()).numel())
        more = results[0]["bits"] - payload
        assert more == 0 if coeff != "adaptive" else more % 32 == 0 and STEPS * 32 <= more <= STEPS * 32 * 6  # a number per bucket
        if coeff == "adaptive":
            assert 0 < results[0]["hook"]["coeff"] < 1 and results[0]["hook"]["coeff"] == results[1]["hook"]["coeff"]


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
        ("random_block", {"ratio": 4}, {"momentum": MU, "coeff": "adaptive"}),
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


def at_rate_zero() -> Tensor:
    """The change of a rank's residual in a step at rate 0, after two at rate 0.1."""
    from torch.nn.parallel import DistributedDataParallel

    module = model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    hook = CompressedHook(ddp, xutrain.codec("random_block", ratio=4), optimizer=optimizer).attach()
    left = []
    for step, lr in enumerate((0.1, 0.1, 0.0)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        ddp(batch(step, 0)[0]).square().mean().backward()
        optimizer.step()
        left.append(torch.cat([hook.error[name] for name, _ in module.named_parameters()]))
    return left[2] - left[1]


def test_what_is_sent_at_rate_zero_is_still_owed(forked: Callable[..., list[Any]]) -> None:
    assert not any(change.any() for change in forked(at_rate_zero, 2))


def in_memory_format(format: torch.memory_format) -> Tensor:
    """Three steps with a model whose parameters lie in memory as ``format`` says."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)).to(memory_format=format)  # type: ignore[call-overload]
    ddp = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    hook = CompressedHook(ddp, xutrain.codec("scaled_sign"), optimizer=optimizer, momentum=MU, coeff=1.0).attach()
    for step in range(3):
        optimizer.zero_grad()
        with hook.detached():
            ddp(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    return flat(module)


def test_a_residual_lies_as_its_parameter_lies(forked: Callable[..., list[Any]]) -> None:
    """The scaled sign does not depend on the order of the elements, so channels last changes nothing but rounding."""
    plain, last = (forked(in_memory_format, 2, format)[0] for format in (torch.contiguous_format, torch.channels_last))
    assert torch.allclose(plain, last, atol=1e-6, rtol=0)


def test_bad_input() -> None:
    for wrong in ({"coeff": 1.5}, {"momentum": 1.0}, {"coeff": "adaptiv"}, {"coeff": "adaptive"}, {"coeff": 0.3, "error_feedback": False}):
        with pytest.raises(UsageError):
            CompressedHook(model(), xutrain.codec("fp"), **wrong)  # type: ignore[arg-type]
    one = model()
    with pytest.raises(UsageError, match="momentum of its own"):
        CompressedHook(one, xutrain.codec("fp"), momentum=0.9, optimizer=torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(UsageError, match="grow"):
        CompressedHook(model(), xutrain.codec("random_k", ratio=8, rescale=True))
    with pytest.raises(RecipeError, match=r"codec\.ratio"):
        CompressedHook(model(), xutrain.codec("random_block", ratio=1000))


def not_a_number() -> str:
    """A gradient that is not finite at an element that this step's blocks leave out."""
    from torch.nn.parallel import DistributedDataParallel

    from xutrain.engine.rng import Key

    module = model()
    first = next(module.parameters())
    drawn = laid("random_block", ratio=100).positions(flat(module).numel(), Key(0, "hook", 0)).tolist()
    at = next(i for i in range(first.numel()) if i not in drawn)
    mask = torch.zeros(first.numel())
    mask[at] = float("nan")
    first.register_hook(lambda g: g + mask.view_as(g))
    ddp = DistributedDataParallel(module)
    CompressedHook(ddp, xutrain.codec("random_block", ratio=100)).attach()
    try:
        ddp(batch(0, 0)[0]).square().sum().backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


def test_a_gradient_that_is_not_finite_is_refused_though_it_is_not_sent(forked: Callable[..., list[Any]]) -> None:
    assert all("of the vector is not finite" in text for text in forked(not_a_number, 2))
