"""`xutrain.DSM` around a user's own optimizer and model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xutrain


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def loss(module: nn.Module, step: int, rank: int) -> Tensor:
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(1000 * rank + step))
    return ((module(inputs) - inputs[:, :2]) ** 2).mean()


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def train(module: nn.Module, optimizer: torch.optim.Optimizer, dsm: xutrain.DSM, first: int, last: int, rank: int = 0) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss(module, step, rank).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
        assert dsm.step() == ((step + 1) % dsm.local_steps == 0)


def test_one_worker_follows_the_equations() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=3, eta=2.0, beta1=0.5, beta2=0.8, weight_decay=0.1)
    other = copy.deepcopy(module)
    plain = torch.optim.AdamW(other.parameters(), lr=0.01)
    x, m = flat(other), torch.zeros(flat(other).numel())
    for step in range(9):
        train(module, optimizer, dsm, step, step + 1)
        plain.zero_grad()
        loss(other, step, 0).backward()
        gamma = plain.param_groups[0]["lr"] = 0.01 / (1 + step)
        plain.step()
        if step % 3 == 2:
            d = (x - flat(other)) / gamma
            c, m = 0.5 * m + 0.5 * d, 0.8 * m + 0.2 * d
            x = (1 - 2 * gamma * 0.1) * x - 2 * gamma * torch.sign(c)
            nn.utils.vector_to_parameters(x.clone(), other.parameters())
            torch.testing.assert_close(flat(module), x, rtol=1e-6, atol=1e-7)


def _ranks() -> dict[str, Any]:
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    module = model(seed=rank)  # other weights on every rank: rank 0's count
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=4, eta=2.0, beta1=0.3, beta2=0.5)
    start = flat(module)
    train(module, optimizer, dsm, 0, 8, rank)
    at_round_end = flat(module)
    train(module, optimizer, dsm, 8, 10, rank)
    with dsm.evaluating():
        inside = flat(module)
    return {"start": start, "end": at_round_end, "inside": inside, "after": flat(module)}


def test_ranks_start_and_stay_equal_at_the_ends_of_rounds(forked: Callable[..., list[Any]]) -> None:
    first, second = forked(_ranks, 2)
    assert torch.equal(first["start"], second["start"]) and torch.equal(first["start"], flat(model(0)))
    assert torch.equal(first["end"], second["end"])
    assert torch.equal(first["inside"], first["end"]) and torch.equal(second["inside"], first["end"])
    assert not torch.equal(first["after"], second["after"])  # in mid-round every rank is alone


def test_state_goes_on_bit_by_bit_in_mid_round() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=4, beta1=0.3, beta2=0.5)
    train(module, optimizer, dsm, 0, 6)
    saved = copy.deepcopy({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "dsm": dsm.state_dict()})
    train(module, optimizer, dsm, 6, 13)
    other = model(seed=9)
    again = torch.optim.AdamW(other.parameters(), lr=0.01)
    resumed = xutrain.DSM(again, local_steps=4, beta1=0.3, beta2=0.5)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["dsm"])
    train(other, again, resumed, 6, 13)
    assert torch.equal(flat(module), flat(other))


def test_a_displacement_that_is_not_finite_is_taken_back() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=1)
    before = flat(module)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    dsm.step()
    assert torch.equal(flat(module), before)


def test_a_broken_round_does_not_break_the_next() -> None:
    """AdamW keeps what it is given: without new moments no later displacement would be finite."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=2)
    before = flat(module)
    for step in range(4):
        optimizer.zero_grad()
        (loss(module, step, 0) * (float("nan") if step == 1 else 1.0)).backward()
        optimizer.step()
        dsm.step()
        if step == 1:
            assert dsm.skipped == 1 and torch.equal(flat(module), before)
    assert dsm.skipped == 1 and bool(torch.isfinite(flat(module)).all()) and not torch.equal(flat(module), before)


def test_one_sgd_step_in_float64_is_lion() -> None:
    """tau = 1: Lion of rate eta gamma; x_t and m keep the precision of the parameters."""
    start = torch.linspace(-1, 1, 9, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    dsm = xutrain.DSM(optimizer, local_steps=1, eta=1.5, beta1=0.9, beta2=0.97, weight_decay=0.1)
    x, m = start.clone(), torch.zeros_like(start)
    for step in range(100):
        noise = torch.randn(9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        parameter.grad = parameter.detach() - 0.3 + noise
        g = x - 0.3 + noise
        optimizer.step()
        dsm.step()
        c, m = 0.9 * m + 0.1 * g, 0.97 * m + 0.03 * g
        x = (1 - 0.03 * 0.1) * x - 0.03 * torch.sign(c)
    assert float((parameter.detach() - x).abs().max()) < 1e-12


def test_a_scheduler_may_step_before_the_global_step() -> None:
    """gamma is the rate that was used, also where the scheduler has reached 0 by then; groups have their own."""
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.125}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 2)
    dsm = xutrain.DSM(optimizer, local_steps=2, eta=2.0, weight_decay=0.0)
    for _ in range(2):
        first.grad, second.grad = torch.ones(3), -torch.ones(2)
        optimizer.step()
        scheduler.step()
        dsm.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert torch.equal(first.detach(), torch.full((3,), -2 * 0.25)) and torch.equal(second.detach(), torch.full((2,), 2 * 0.0625))


def test_parameters_of_half_precision_have_a_global_state_in_float32() -> None:
    """Steps below the spacing of bfloat16 add up, and rounding of x_t is no displacement."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    dsm = xutrain.DSM(optimizer, local_steps=1, eta=1.0, beta1=0.0, beta2=0.0, weight_decay=0.0)
    for _ in range(20):  # 1e-3 is a quarter of the spacing below 1
        parameter.grad = torch.full_like(parameter, 64.0)
        optimizer.step()
        dsm.step()
    x = dsm.state_dict()["x"][0]
    assert x.dtype == torch.float32 and torch.allclose(x, torch.full((4,), 0.98), rtol=0, atol=1e-6)
    assert torch.equal(parameter.detach(), x.bfloat16())
    parameter.grad = torch.zeros_like(parameter)  # nothing moves: no sign, though x_t is no number of bfloat16
    optimizer.step()
    dsm.step()
    assert torch.equal(dsm.state_dict()["x"][0], x)


def test_frozen_unused_and_oddly_laid_out_parameters() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module[3].weight = nn.Parameter(module[2].weight.detach().clone().t())  # not contiguous
    module[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*module.parameters(), unused], lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=2, eta=2.0, weight_decay=0.0)
    before, bias = [p.detach().clone() for p in module.parameters()], module[0].bias.detach().clone()
    for step in range(2):
        inputs = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
        dsm.step()
    assert torch.equal(module[0].bias, bias) and torch.equal(unused.detach(), torch.ones(3))
    for old, new in zip(before, module.parameters(), strict=True):
        assert old.stride() == new.stride()
        if new.requires_grad:
            torch.testing.assert_close((new - old).abs(), torch.full_like(old, 0.02), rtol=0, atol=1e-6)
    module[2].weight.requires_grad_(False)  # frozen later: it stays, its momentum does not carry it on
    kept = module[2].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
        dsm.step()
    assert torch.equal(module[2].weight, kept)
    module[0].bias.requires_grad_(True)
    dsm.step()
    with pytest.raises(xutrain.RecipeError, match="did not when the DSM was made"):
        dsm.step()


def _unequal_ranks() -> dict[str, Any]:
    """Ranks with other weights, one of them frozen, other rates, and a broken displacement on one rank only."""
    import torch.distributed as dist

    rank = dist.get_rank()
    module = model(seed=rank)
    module[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01 * (1 + rank))  # as a plateau scheduler on each rank's own loss does
    dsm = xutrain.DSM(optimizer, local_steps=2)
    start, ends = flat(module), []
    for step in range(6):
        optimizer.zero_grad()
        (loss(module, step, rank) * (float("nan") if (step, rank) == (2, 1) else 1.0)).backward()
        optimizer.step()
        if dsm.step():
            ends.append(flat(module))
    return {"start": start, "ends": ends, "skipped": dsm.skipped}


def test_ranks_that_differ_have_one_global_model(forked: Callable[..., list[Any]]) -> None:
    first, second = forked(_unequal_ranks, 2)
    assert torch.equal(first["start"], second["start"]) and torch.equal(first["start"], flat(model(0)))
    for a, b in zip(first["ends"], second["ends"], strict=True):
        assert torch.equal(a, b) and bool(torch.isfinite(a).all())
    assert first["skipped"] == second["skipped"] == 1 and torch.equal(first["ends"][0], first["ends"][1])
    assert not torch.equal(first["ends"][1], first["ends"][2])


def test_a_state_goes_to_another_tau_and_not_to_another_model() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    dsm = xutrain.DSM(optimizer, local_steps=4)
    train(module, optimizer, dsm, 0, 6)
    saved = copy.deepcopy(dsm.state_dict())
    resumed = xutrain.DSM(optimizer, local_steps=3)
    resumed.load_state_dict(saved)
    assert resumed.step() and not resumed.step()  # two steps of the round were taken
    with pytest.raises(xutrain.RecipeError, match="other parameters"):
        xutrain.DSM(torch.optim.SGD(nn.Linear(5, 7).parameters(), lr=0.01)).load_state_dict(saved)


def test_a_process_group_that_comes_too_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dsm = xutrain.DSM(torch.optim.SGD(model().parameters(), lr=0.1))
    monkeypatch.setattr("xutrain.dsm.joined", lambda: (0, 2))
    with pytest.raises(xutrain.RecipeError, match="after the DSM was made"):
        dsm.step()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"local_steps": v} for v in (0, 2.5, True, "6")),
        *({"eta": v} for v in (0.0, float("inf"), float("nan"), "1")),
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"weight_decay": -1.0},
        {"weight_decay": None},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(xutrain.RecipeError):
        xutrain.DSM(torch.optim.SGD(model().parameters(), lr=0.1), **wrong)


def test_what_is_no_optimizer_of_real_numbers_is_refused() -> None:
    with pytest.raises(xutrain.RecipeError, match="no torch optimizer"):
        xutrain.DSM(model())  # type: ignore[arg-type]
    for parameter in (nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2, dtype=torch.complex64))):
        with pytest.raises(xutrain.RecipeError, match="nothing to train"):
            xutrain.DSM(torch.optim.SGD([parameter], lr=0.1))
