"""The hook's collectives on real DDP over gloo: all-to-all is the exchange's, and overlap changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # DDP imports it; once here instead of in every forked process
from torch import Tensor, nn

import xutrain
from xutrain.engine.network import Link
from xutrain.engine.rng import Key
from xutrain.errors import UsageError
from xutrain.hooks import CompressedHook


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))


def gradients(rank: int, step: int, module: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(100 * step + rank)
    inputs, targets = torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g)
    module.zero_grad()
    nn.functional.cross_entropy(module(inputs), targets).backward()
    return torch.cat([p.grad.reshape(-1) for p in module.parameters()])


def train(codec: str, options: dict[str, Any], cap_mb: float, how: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """(weights after 4 steps, the first step's reduced gradient, bits that this rank sent)."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    module = model()
    ddp = DistributedDataParallel(module, bucket_cap_mb=cap_mb)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    hook = CompressedHook(ddp, xutrain.codec(codec, **options), optimizer=optimizer, **how).attach()
    first = torch.empty(0)
    for step in range(4):
        reduced = gradients(dist.get_rank(), step, ddp)
        first = reduced if step == 0 else first
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), first, hook.bits


def exchanged(codec: Any, vector: Tensor, key: Key) -> tuple[Tensor, int]:
    """What the loop's exchange makes of it, and the bits that a rank sends."""
    import torch.distributed as dist

    from xutrain.engine.meter import BitMeter
    from xutrain.engine.workers import Workers
    from xutrain.methods.exchange import Exchange

    count = dist.get_world_size()
    exchange = Exchange(Workers(count, dist.get_rank(), count), codec, BitMeter(), "alltoall")
    return exchange.mean([vector], key).mean, exchange.bits(vector.numel())[0] // count


def both_ways() -> tuple[Tensor, int, Tensor, int]:
    import torch.distributed as dist

    options = {"levels": 5, "bucket": 64}  # groups of 24 symbols: a shard's last one is padded
    _, hooked, bits = train("orq", options, 25.0, {"mode": "alltoall", "error_feedback": False})
    vector = gradients(dist.get_rank(), 0, model())
    return hooked, bits, *exchanged(xutrain.codec("orq", **options), vector, Key(0, "hook", 0))


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_to_all_is_the_exchange(ranks: int, forked: Callable[..., list[Any]]) -> None:
    for hooked, bits, expected, each in forked(both_ways, ranks):
        assert torch.equal(hooked, expected)
        assert bits == 4 * each


def test_numbers_that_are_added_are_counted_in_every_mode(forked: Callable[..., list[Any]]) -> None:
    sent = [forked(train, 2, "fp", {}, 25.0, {"mode": mode, "error_feedback": False})[0][2] for mode in ("allgather", "alltoall")]
    assert sent[0] == sent[1] == 4 * 32 * sum(p.numel() for p in model().parameters())


@pytest.mark.parametrize("cap", [25.0, 0.001])
@pytest.mark.parametrize(
    ("codec", "options", "how"),
    [
        ("orq", {"levels": 3, "bucket": 64}, {"mode": "alltoall", "error_feedback": False}),
        ("orq", {"levels": 9, "bucket": 64}, {"error_feedback": False}),
        ("bingrad_b", {"bucket": 64}, {"mode": "auto", "link": Link(1e3, 0.0), "error_feedback": False}),
        ("random_block", {"ratio": 8}, {"mode": "auto"}),
    ],
)
def test_overlap_changes_no_bit(cap: float, codec: str, options: Any, how: Any, forked: Callable[..., list[Any]]) -> None:
    ahead = forked(train, 3, codec, options, cap, how)
    waiting = forked(train, 3, codec, options, cap, {**how, "overlap": False})
    assert torch.equal(ahead[0][0], ahead[2][0])
    for a, b in zip(ahead, waiting, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_what_cannot_be() -> None:
    for wrong in ({"mode": "alltoall"}, {"mode": "nope"}):
        with pytest.raises(UsageError, match="mode"):
            CompressedHook(model(), xutrain.codec("orq"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tensor by tensor"):
        CompressedHook(model(), xutrain.codec("top_k", ratio=8), mode="alltoall", error_feedback=False)
