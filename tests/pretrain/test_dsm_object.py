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


@pytest.mark.parametrize("wrong", [{"local_steps": 0}, {"eta": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"weight_decay": -1.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(xutrain.RecipeError):
        xutrain.DSM(torch.optim.SGD(model().parameters(), lr=0.1), **wrong)
