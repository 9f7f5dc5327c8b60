"""Every update rule against a hand-written one, in float64: section by section what each method must equal in its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pretrain_problems import DIM, LAYOUT, build, drive, gradient
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.pretrain.signs import maxima, signs

RATES = [0.05 * (1 + math.cos(k / 9)) for k in range(24)]


def displaced(x: Tensor, step: int, rates: list[float], workers: int) -> list[Tensor]:
    """Where plain SGD takes each worker in one round from ``x``."""
    ends = []
    for w in range(workers):
        y = x.clone()
        for k, lr in enumerate(rates):
            y = y - lr * gradient(step + k, w, y)
        ends.append(y)
    return ends


def reference(rule: Any, tau: int, workers: int = 4) -> Tensor:
    """Rounds of SGD with ``rule(x, D, gamma) -> x`` between them."""
    x = build("local_adamw", {"local_steps": tau}).deploy()["x"].clone()
    for start in range(0, len(RATES), tau):
        gamma = RATES[start + tau - 1]
        ends = displaced(x, start, RATES[start : start + tau], workers)
        x = rule(x, sum((x - y) for y in ends) / workers / gamma, gamma)
    return x


def test_dsm_with_one_local_sgd_step_is_lion() -> None:
    """Lion(lr = eta gamma, (beta1, beta2), weight decay lambda) on the averaged gradient, 200 steps."""
    rates = [0.02] * 200
    dsm = build("dsm", {"local_steps": 1, "eta": 1.5, "beta1": 0.9, "beta2": 0.97, "weight_decay": 0.1}, steps=200)
    lion = build("lion", {}, optimizer={"name": "lion", "betas": [0.9, 0.97], "weight_decay": 0.1, "decay": "all"}, steps=200)
    got = drive(dsm, rates)
    wanted = drive(lion, [1.5 * r for r in rates])
    assert float((got - wanted).abs().max()) < 1e-12


def test_dsm_follows_its_equations() -> None:
    m = torch.zeros(DIM, dtype=torch.float64)

    def rule(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        nonlocal m
        c = 0.8 * m + 0.2 * d
        m = 0.9 * m + 0.1 * d
        return (1 - 2 * gamma * 0.1) * x - 2 * gamma * torch.sign(c)

    got = drive(build("dsm", {"local_steps": 6, "eta": 2.0, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}), RATES)
    torch.testing.assert_close(got, reference(rule, 6), rtol=0, atol=1e-12)


def test_slowmo_global_adamw_and_diloco_follow_their_equations() -> None:
    state: dict[str, Any] = {"u": 0.0, "m": 0.0, "v": 0.0, "r": 0}

    def slowmo(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        state["u"] = 0.4 * state["u"] + d
        return x - 0.9 * gamma * state["u"]

    def diloco(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        g = d * gamma
        state["v"] = 0.9 * state["v"] + g
        return x - 0.7 * (g + 0.9 * state["v"])

    got = drive(build("slowmo", {"local_steps": 4, "alpha": 0.9, "beta": 0.4}), RATES)
    torch.testing.assert_close(got, reference(slowmo, 4), rtol=0, atol=1e-12)
    got = drive(build("diloco", {"local_steps": 4}), RATES)
    torch.testing.assert_close(got, reference(diloco, 4), rtol=0, atol=1e-12)

    state.update(m=0.0, v=0.0, r=0)

    def adamw(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        state["r"] += 1
        state["m"] = 0.9 * state["m"] + 0.1 * d
        state["v"] = 0.95 * state["v"] + 0.05 * d * d
        root = (state["v"] / (1 - 0.95 ** state["r"])).sqrt() + 1e-8
        return (1 - 2 * gamma * 0.1) * x - 2 * gamma * state["m"] / (1 - 0.9 ** state["r"]) / root

    got = drive(build("global_adamw", {"local_steps": 4, "eta": 2.0}), RATES)
    torch.testing.assert_close(got, reference(adamw, 4), rtol=0, atol=1e-10)


def test_diloco_is_torch_sgd_with_nesterov() -> None:
    parameter = torch.nn.Parameter(build("diloco", {"local_steps": 4}).deploy()["x"].clone())
    outer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)

    def rule(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        parameter.grad = d * gamma
        outer.step()
        return parameter.detach().clone()

    torch.testing.assert_close(drive(build("diloco", {"local_steps": 4}), RATES), reference(rule, 4), rtol=0, atol=1e-12)


def test_limits_of_the_averaging_family() -> None:
    average = drive(build("local_adamw", {"local_steps": 6}), RATES)
    slowmo = drive(build("slowmo", {"local_steps": 6, "alpha": 1.0, "beta": 0.0}), RATES)
    torch.testing.assert_close(average, slowmo, rtol=0, atol=2e-15)
    torch.testing.assert_close(average, drive(build("diloco", {"local_steps": 6, "lr": 1.0, "momentum": 0.0}), RATES), rtol=0, atol=0)
    alpha = drive(build("lookahead", {"local_steps": 6, "alpha": 0.3}), RATES)
    torch.testing.assert_close(alpha, reference(lambda x, d, g: (1 - 0.3) * x + 0.3 * (x - g * d), 6), rtol=0, atol=1e-13)
    torch.testing.assert_close(alpha, drive(build("slowmo", {"local_steps": 6, "alpha": 0.3, "beta": 0.0}), RATES), rtol=0, atol=1e-13)


def test_slowmo_is_an_exponential_average() -> None:
    """x - eta gamma m with m = beta m + (1 - beta) D is SlowMo with alpha = eta (1 - beta)."""
    m = torch.zeros(DIM, dtype=torch.float64)

    def rule(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        nonlocal m
        m = 0.6 * m + 0.4 * d
        return x - 2.0 * gamma * m

    got = drive(build("slowmo", {"local_steps": 6, "alpha": 2.0 * 0.4, "beta": 0.6}), RATES)
    torch.testing.assert_close(got, reference(rule, 6), rtol=0, atol=1e-13)


def test_signed_forms_and_their_limits() -> None:
    m = torch.zeros(DIM, dtype=torch.float64)

    def form_a(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        nonlocal m
        m = 0.7 * m + 0.3 * d
        return (1 - 0.2 * gamma) * x - 2 * gamma * torch.sign(m)

    def form_b(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        nonlocal m
        m = 0.7 * m + 0.3 * torch.sign(d)
        return (1 - 0.2 * gamma) * x - 2 * gamma * m

    chosen = {"local_steps": 6, "eta": 2.0, "weight_decay": 0.1}
    torch.testing.assert_close(drive(build("signed_slowmo_a", {**chosen, "beta": 0.7}), RATES), reference(form_a, 6), rtol=0, atol=1e-12)
    m = torch.zeros(DIM, dtype=torch.float64)
    torch.testing.assert_close(drive(build("signed_slowmo_b", {**chosen, "beta": 0.7}), RATES), reference(form_b, 6), rtol=0, atol=1e-12)
    lookahead = drive(build("signed_lookahead", chosen), RATES)
    assert torch.equal(lookahead, drive(build("dsm", {**chosen, "beta1": 0.0, "beta2": 0.0}), RATES))
    assert torch.equal(lookahead, drive(build("signed_slowmo_a", {**chosen, "beta": 0.0}), RATES))
    assert torch.equal(lookahead, drive(build("signed_slowmo_b", {**chosen, "beta": 0.0}), RATES))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_every_coordinate_moves_by_one_length(beta: float) -> None:
    method = build("dsm", {"local_steps": 3, "eta": 2.0, "beta1": beta, "beta2": beta, "weight_decay": 0.1})
    for start in range(0, 24, 3):
        before = method.deploy()["x"].clone()
        after = drive(method, RATES[start : start + 3], start)
        length = 2.0 * RATES[start + 2]
        moved = (after - (1 - length * 0.1) * before).abs()
        assert bool(((moved - length).abs() < 1e-14).logical_or(moved < 1e-14).all())
        assert beta > 0 or bool(((moved - length).abs() < 1e-14).all())


def test_scale_of_the_displacements_does_not_matter() -> None:
    """All gradients and all local rates scaled: the displacement over gamma grows, the signs stay."""

    def scaled(step: int, worker: int, x: Tensor) -> Tensor:
        return 8.0 * gradient(step, worker, origin)

    def plain(step: int, worker: int, x: Tensor) -> Tensor:
        return gradient(step, worker, origin)

    origin = torch.zeros(DIM, dtype=torch.float64)
    options = {"local_steps": 4, "eta": 2.0}
    assert torch.equal(drive(build("dsm", options), RATES, of=plain), drive(build("dsm", options), RATES, of=scaled))


def test_which_rate_of_the_round_is_gamma() -> None:
    rising = [0.01, 0.02, 0.03]
    for choice, gamma in (("first", 0.01), ("mean", 0.02), ("last", 0.03)):
        method = build("signed_lookahead", {"local_steps": 3, "gamma": choice, "weight_decay": 0.0})
        before = method.deploy()["x"].clone()
        moved = (drive(method, rising) - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, gamma), rtol=1e-9, atol=0)


def test_nothing_moves_at_rate_zero() -> None:
    method = build("dsm", {"local_steps": 2})
    before = method.deploy()["x"].clone()
    assert torch.equal(drive(method, [0.0, 0.0]), before)
    assert method.diagnostics()["rounds_skipped"] == 1.0


@pytest.mark.parametrize(("name", "options"), [("local_adamw", {}), ("lookahead", {"alpha": 0.3}), ("diloco", {})])
def test_a_last_rate_of_zero_does_not_cost_a_round_that_is_not_divided_by_it(name: str, options: dict[str, Any]) -> None:
    method = build(name, {"local_steps": 3, **options})
    got = drive(method, [0.1, 0.1, 0.0])
    wanted = drive(build(name, {"local_steps": 2, **options}), [0.1, 0.1])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert "rounds_skipped" not in method.diagnostics()


def test_global_decay_on_matrices_only() -> None:
    everything = build("signed_lookahead", {"local_steps": 1, "weight_decay": 0.5})
    matrices = build("signed_lookahead", {"local_steps": 1, "weight_decay": 0.5, "decay": "matrices"})
    a, b = drive(everything, [0.1]), drive(matrices, [0.1])
    assert torch.equal(a[:15], b[:15])
    assert not bool((a[15:] == b[15:]).any())


@pytest.mark.parametrize("kind", ["random2", "random3"])
def test_random_signs_are_unbiased(kind: str) -> None:
    values = torch.tensor([-4.0, -1.0, -0.01, 0.5, 3.0])
    draws = 400_000
    for value in values:
        got = signs(torch.full((draws,), float(value)), kind, 5.0, Key(1, kind))
        assert set(got.unique().tolist()) <= {-1.0, 0.0, 1.0}
        share = float(value) / 5
        variance = 1 - share**2 if kind == "random2" else abs(share) - share**2
        assert abs(float(got.mean()) - share) < 4 * math.sqrt(variance / draws)


def test_random_signs_of_a_part_are_those_of_the_whole() -> None:
    v = torch.randn(1000, generator=Key(3, "v").generator())
    whole = signs(v, "random3", 4.0, Key(1, "sign", 9))
    assert torch.equal(whole[137:500], signs(v[137:500], "random3", 4.0, Key(1, "sign", 9), start=137))
    bounds = v.abs() + 1
    whole = signs(v, "random2", bounds, Key(1, "sign", 9))
    assert torch.equal(whole[137:500], signs(v[137:500], "random2", bounds[137:500], Key(1, "sign", 9), start=137))
    assert torch.equal(signs(torch.zeros(8), "random2", torch.zeros(8), Key()), torch.zeros(8))  # B = 0 gives 0


def test_largest_values_of_the_tensors_in_a_part() -> None:
    v = torch.arange(-11.0, DIM - 11)
    assert maxima(v, LAYOUT).tolist() == [11.0, 11.0]
    assert maxima(v[4:9], LAYOUT, 4).tolist() == [7.0, 0.0]
    assert maxima(v[13:17], LAYOUT, 13).tolist() == [3.0, 5.0]
    assert maxima(v[:0], LAYOUT, 23).tolist() == [0.0, 0.0]


def test_random_signs_against_the_largest_value_of_each_tensor() -> None:
    """B is the tensor's: the largest coordinate of each always has its sign, and the mean over many draws is c / B."""
    still = torch.linspace(-2, 1, DIM, dtype=torch.float64)  # gradients that stay: D = still
    total, rounds = torch.zeros(DIM, dtype=torch.float64), 600
    method = build("signed_lookahead", {"local_steps": 1, "sign": "random2", "weight_decay": 0.0}, workers=1, steps=rounds)
    for step in range(rounds):
        before = method.deploy()["x"].clone()
        total += (before - drive(method, [0.01], step, of=lambda step, worker, x: still.clone())) / 0.01
    bound = torch.cat([still[p.start : p.stop].abs().max().expand(p.numel) for p in LAYOUT])
    share = still / bound
    assert bool(((total / rounds - share).abs() <= 4.5 * ((1 - share**2) / rounds).sqrt() + 1e-9).all())


@pytest.mark.parametrize("by", ["max", "l2"])
@pytest.mark.parametrize("where", ["displacement", "before", "after", "update"])
def test_slowmo_with_clipping(where: str, by: str) -> None:
    """The program's four places and two norms; the displacement is clipped before it is divided by gamma."""
    limit = {"displacement": 0.02, "before": 0.7, "after": 0.7, "update": 0.7}[where] * (1 if by == "max" else 3)
    hit = []

    def clip(v: Tensor, size: float) -> Tensor:
        cut = v.clamp(-size, size) if by == "max" else torch.cat([p * min(1.0, size / float(p.norm())) for p in (v[:15], v[15:])])
        hit.append(bool((cut != v).any()))
        return cut

    u = torch.zeros(DIM, dtype=torch.float64)

    def rule(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        nonlocal u
        old = clip(u, limit) if where == "before" and bool(u.any()) else u
        new = 0.6 * old + (clip(gamma * d, limit) / gamma if where == "displacement" else d)
        u = clip(new, limit) if where == "after" else new
        return x - 0.9 * gamma * (clip(u, limit) if where == "update" else u)

    chosen = {"local_steps": 4, "alpha": 0.9, "beta": 0.6, "clip": limit, "clip_where": where, "clip_by": by}
    torch.testing.assert_close(drive(build("slowmo", chosen), RATES), reference(rule, 4), rtol=0, atol=1e-12)
    assert any(hit) and not torch.equal(drive(build("slowmo", {**chosen, "clip": None}), RATES), drive(build("slowmo", chosen), RATES))


def test_eta_of_form_b_falls_in_a_line() -> None:
    """At the round that ends with step k (from 0): eta - k / eta_steps (eta - eta_end), then eta_end."""
    m, step = torch.zeros(DIM, dtype=torch.float64), -1

    def rule(x: Tensor, d: Tensor, gamma: float) -> Tensor:
        nonlocal m, step
        step += 4
        eta = 3.0 - step / 13 * (3.0 - 0.5) if step <= 13 else 0.5
        m = 0.7 * m + 0.3 * torch.sign(d)
        return (1 - eta * gamma * 0.1) * x - eta * gamma * m

    chosen = {"local_steps": 4, "beta": 0.7, "eta": 3.0, "eta_end": 0.5, "eta_steps": 13, "weight_decay": 0.1}
    torch.testing.assert_close(drive(build("signed_slowmo_b", chosen), RATES), reference(rule, 4), rtol=0, atol=1e-12)


def test_steps_left_over_end_in_a_plain_average() -> None:
    method = build("dsm", {"local_steps": 5}, steps=7)
    x = drive(method, RATES[:5]).clone()
    ends = displaced(x, 5, RATES[5:7], 4)
    got = drive(method, RATES[5:7], 5)
    torch.testing.assert_close(got, sum(ends) / 4, rtol=0, atol=1e-14)
    assert "2 more" in method.notes()[0]
    assert [step for step in range(7) if method.exchanges(step)] == [4, 6]
    assert method.planned_bits(7)["last average"][0] == 4 * 32 * DIM


def test_a_broken_worker_costs_one_round() -> None:
    """A displacement that is not finite on any worker: all go back to x_t, and the broken one forgets its moments."""

    def breaks(step: int, worker: int, x: Tensor) -> Tensor:
        return gradient(step, worker, x) * (float("inf") if (step, worker) == (3, 2) else 1.0)

    method = build("dsm", {"local_steps": 2}, optimizer={"name": "adamw"})
    first = drive(method, RATES[:2], of=breaks).clone()
    assert torch.equal(drive(method, RATES[2:4], 2, of=breaks), first)
    later = drive(method, RATES[4:6], 4, of=breaks)
    assert bool(torch.isfinite(later).all()) and not torch.equal(later, first)
    assert method.diagnostics()["rounds_skipped"] == 1.0


def test_a_broken_worker_does_not_break_the_last_average() -> None:
    """Steps left over by the last full round: all go back to x_t, as at the end of a round."""

    def breaks(step: int, worker: int, x: Tensor) -> Tensor:
        return gradient(step, worker, x) * (float("inf") if (step, worker) == (4, 2) else 1.0)

    method = build("dsm", {"local_steps": 4}, steps=5)
    first = drive(method, RATES[:4], of=breaks).clone()
    assert torch.equal(drive(method, RATES[4:5], 4, of=breaks), first)
    assert method.diagnostics()["rounds_skipped"] == 1.0


@pytest.mark.parametrize("workers", [2, 4])
def test_identical_workers_are_one(workers: int) -> None:
    def same(step: int, worker: int, x: Tensor) -> Tensor:
        return gradient(step, 0, x)

    options = {"local_steps": 3, "eta": 2.0}
    many = build("dsm", options, workers=workers, optimizer={"name": "adamw"})
    one = build("dsm", options, workers=1, optimizer={"name": "adamw"})
    assert torch.equal(drive(many, RATES, of=same), drive(one, RATES, of=same))


def test_sign_descent_stalls_at_its_step_and_converges_with_a_falling_one() -> None:
    """mean_i 1/2 ||A_i x - b_i||^2: with eta gamma ~ 1/sqrt(T) the l1 gradient norm falls with T; constant, it stalls."""
    generator = Key(11, "quadratic").generator()
    a = torch.randn(4, 30, DIM, generator=generator, dtype=torch.float64) / math.sqrt(30)
    b = torch.randn(4, 30, generator=generator, dtype=torch.float64)

    def of(step: int, worker: int, x: Tensor) -> Tensor:
        return a[worker].T @ (a[worker] @ x - b[worker])

    def norm(rounds: int, rate: float) -> float:
        method = build("dsm", {"local_steps": 4, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.0}, steps=4 * rounds)
        drive(method, [rate] * (4 * rounds), of=of)
        x = method.deploy()["x"]
        return float(sum(of(0, w, x) for w in range(4)).abs().sum()) / 4

    falling = [norm(rounds, 0.6 / math.sqrt(rounds)) for rounds in (25, 100, 400)]
    assert falling[0] > 1.5 * falling[1] > 2.2 * falling[2]
    stalled = [norm(400, rate) for rate in (0.06, 0.03)]
    assert stalled[0] > 1.5 * stalled[1]  # the floor is proportional to the step
    assert abs(norm(800, 0.06) / stalled[0] - 1) < 0.5


def test_horizon_of_the_momentum_is_checked_against_the_rounds() -> None:
    assert "more than 5%" in build("dsm", {"local_steps": 12, "beta2": 0.98}, steps=1200).notes()[0]
    assert not build("dsm", {"local_steps": 12, "beta2": 0.98}, steps=12_000).notes()
    assert not build("dsm", {"local_steps": 12, "beta1": 0.3, "beta2": 0.5}, steps=240).notes()
