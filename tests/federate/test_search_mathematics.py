"""The exact half of a search: scores, windows, legal values, laws. Numbers in the names are those of the specification's list."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from quadratic_bed import CLIENTS, NoOptions, agent, space
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.federate.base import Round
from xutrain.methods.federate.search import dirichlet
from xutrain.methods.federate.search.base import Noise
from xutrain.methods.federate.search.gaussian import score_factor, score_mean
from xutrain.methods.federate.search.reinforce import adam_ascent, advantages, reward
from xutrain.registry import Named

D = CLIENTS + 3
BASE = Round(3, 0.1, tuple(range(CLIENTS)), (5,) * CLIENTS, (1 / CLIENTS,) * CLIENTS)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(**named: float) -> Tensor:
    """A sample with some coordinates set."""
    return vector(*(named.get(c.name, 0.0) for c in space().coordinates))


@pytest.mark.parametrize(("baseline", "factor"), [("mean", 4), ("none", 5), ("leave_one_out", 5)])
def test_1_expectation_of_the_windowed_estimator(baseline: str, factor: int) -> None:
    """u ~ N(0, s^2 I), r = a.u: E g = (n - 1) a with the mean of the window in it, n a without one or with the others' mean."""
    a, std, n, draws = vector(0.3, -0.2, 0.1), 0.33, 5, 40_000
    u = std * torch.randn(draws, n, 3, generator=Key(1, "test").generator(), dtype=torch.float64)
    r = u @ a
    first = advantages(r[0].tolist(), baseline)
    centred = {"mean": r - r.mean(1, keepdim=True), "none": r, "leave_one_out": (r - r.mean(1, keepdim=True)) * n / (n - 1)}[baseline]
    assert torch.allclose(first, centred[0], atol=1e-15)
    g = (centred[..., None] * u / std**2).sum(1)
    error = g.std(0) / draws**0.5
    assert bool(((g.mean(0) - factor * a).abs() < 4 * error).all())


def test_2_a_constant_changes_nothing() -> None:
    r = [0.3, -0.1, 0.02, 0.4]
    for baseline in ("mean", "leave_one_out"):
        assert torch.allclose(advantages(r, baseline), advantages([x + 7 for x in r], baseline), atol=1e-12)
    for form in ("relative", "log"):
        assert reward(3.0, 2.0, form) == pytest.approx(reward(3e5, 2e5, form), rel=1e-12)


def test_rewards() -> None:
    assert reward(2.0, 1.0) == 0.5 and reward(1.0, 5.0) == -1.0 and reward(1.0, 5.0, clip=None) == -4.0
    assert reward(0.0, 1.0) == 0.0 and reward(0.0, 0.0) == 0.0
    assert reward(1.0, math.nan) == reward(1.0, math.inf) == -1.0
    assert reward(2.0, 1.0, "log") == pytest.approx(math.log(2)) and reward(1.0, 0.0, "log") == 1.0
    assert advantages([1.0, 2.0, 6.0]).tolist() == [-2, -1, 3]
    assert advantages([1.0, 2.0, 6.0], newest=True).tolist() == [0, 0, 3]
    assert advantages([1.0, 2.0, 6.0], oldest=True).tolist() == [-2, 0, 0]
    assert advantages([4.0], "leave_one_out").tolist() == [0] and advantages([]).tolist() == []


def log_normal(u: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    precision = factor @ factor.T
    law = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    return law.log_prob(u)


def test_4_gradients_of_the_gaussian() -> None:
    generator = Key(4, "test").generator()
    factor = torch.tril(torch.randn(D, D, generator=generator, dtype=torch.float64)) + 9 * torch.eye(D, dtype=torch.float64)
    mean, u = (0.1 * torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(2))
    m, f = mean.clone().requires_grad_(), factor.clone().requires_grad_()
    by_mean, by_factor = torch.autograd.grad(log_normal(u, m, f), (m, f))
    z = u - mean
    assert torch.allclose(score_mean(factor @ factor.T, z), by_mean, rtol=1e-6, atol=1e-9)
    assert torch.allclose(score_factor(factor, z), by_factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cov", ["fixed", "diag", "chol"])
def test_4_gradients_of_an_agent_in_its_parameters(cov: str) -> None:
    actor: Any = agent("gaussian", cov=cov, init_std=0.3)
    state = actor.start()
    state["params"]["mean"] += 0.1 * torch.arange(D) / D
    samples = [{"u": actor.draw(state, Noise(Key(0, "t", i)))[0], "given": {}} for i in range(4)]
    weights = vector(0.5, -0.2, -0.4, 0.1)
    found = actor.gradient(state, samples, weights[:, None].expand(-1, D))
    leaves = {k: v.clone().requires_grad_() for k, v in state["params"].items()}
    held = {"params": leaves}
    factor = actor.factor(held) if cov == "chol" else torch.diag(1 / actor.std(held))
    total = sum(w * log_normal(s["u"], leaves["mean"], factor) for w, s in zip(weights, samples, strict=True))
    for name, expected in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(found[name], expected, rtol=1e-6, atol=1e-8), name


def test_4_gradients_of_the_other_laws() -> None:
    kappa = vector(5.0, 0.3, 2.0).requires_grad_()
    shares = vector(0.6, 0.1, 0.3)
    (slope,) = torch.autograd.grad(torch.distributions.Dirichlet(kappa).log_prob(shares), kappa)
    assert torch.allclose(dirichlet.score(kappa.detach(), shares), slope, atol=1e-9)
    few = space(weights=None)
    joint: Any = agent("discrete", few)
    state = joint.start()
    state["params"]["mean"] += vector(0.1, -0.2, 0.3)
    cell = {"u": joint.grid[7].clone(), "given": {}}
    mean = state["params"]["mean"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(joint.probabilities(mean)[7].log(), mean)
    assert torch.allclose(joint.gradient(state, [cell], torch.ones(1, 3, dtype=torch.float64))["mean"], slope, atol=1e-9)
    apart: Any = agent("discrete_factorised", space(lr={"low": 0.1, "high": 1.0, "points": 3}, weights=None))
    state = apart.start()
    state["params"]["logits"] += torch.randn(apart.grid.shape, generator=Key(9, "t").generator(), dtype=torch.float64)
    u, more = apart.draw(state, Noise(Key(1, "t")))
    logits = state["params"]["logits"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(apart.probabilities(logits).gather(1, more["cell"][:, None]).log().sum(), logits)
    found = apart.gradient(state, [{"u": u, "given": more}], torch.ones(1, 3, dtype=torch.float64))["logits"]
    assert torch.allclose(found, slope, atol=1e-9) and bool((found[0, 3:] == 0).all())


@pytest.mark.parametrize("name", ["gaussian", "mlp", "discrete_factorised"])
def test_discrete_and_continuous_draws_follow_their_law(name: str) -> None:
    actor = agent(name, space(weights=None))
    state = actor.start()
    drawn = torch.stack([actor.draw(state, Noise(Key(2, "draw", i)))[0] for i in range(4000)])
    mean, std = actor.moments(state)
    assert bool(((drawn.mean(0) - mean).abs() < 5 * std / 4000**0.5).all())
    assert torch.allclose(drawn.std(0), std, rtol=0.06)


def test_joint_draws_follow_their_law() -> None:
    actor: Any = agent("discrete", space(weights=None))
    state = actor.start()
    state["params"]["mean"] += vector(0.3, 0.0, -0.4)
    drawn = torch.stack([actor.draw(state, Noise(Key(2, "draw", i)))[0] for i in range(3000)])
    mean, std = actor.moments(state)
    assert bool(((drawn.mean(0) - mean).abs() < 5 * std / 3000**0.5).all())


def test_8_weights_at_every_corner() -> None:
    low, high = 1.0, 0.0
    for corner in itertools.product((-0.5, 0.5), repeat=CLIENTS):
        weights = space().setting(at(**{f"weight_{k}": x for k, x in enumerate(corner)}), BASE).weights
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
        low, high = min(low, *weights), max(high, *weights)
    assert low == pytest.approx(0.055, abs=5e-4) and high == pytest.approx(0.260, abs=5e-4)
    assert math.exp(0.9) == pytest.approx(2.46, abs=5e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=CLIENTS, max_size=CLIENTS), st.floats(-1, 1))
def test_8_a_shift_of_all_weights_changes_nothing(drawn: list[float], shift: float) -> None:
    plain = space().setting(at(**{f"weight_{k}": x for k, x in enumerate(drawn)}), BASE).weights
    moved = space().setting(at(**{f"weight_{k}": x + shift for k, x in enumerate(drawn)}), BASE).weights
    assert moved == pytest.approx(plain, abs=1e-12) and math.fsum(plain) == pytest.approx(1, abs=1e-12)


def test_7_a_single_client_and_a_permutation() -> None:
    alone = space(1)
    one = Round(0, 0.1, (0,), (5,), (1.0,))
    assert alone.setting(vector(0.1, -0.3, 0.44, 0.0), one).weights == (1.0,)
    drawn = [0.1 * k - 0.3 for k in range(CLIENTS)]
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    weights = space().setting(at(**{f"weight_{k}": x for k, x in enumerate(drawn)}), BASE).weights
    permuted = space().setting(at(**{f"weight_{k}": drawn[order[k]] for k in range(CLIENTS)}), BASE).weights
    assert permuted == pytest.approx([weights[k] for k in order], abs=1e-15)


def test_missing_clients_are_dropped_and_the_rest_renormalised() -> None:
    u = at(**{f"weight_{k}": 0.1 * k for k in range(CLIENTS)})
    some = Round(0, 0.1, (1, 4, 6), (5, 5, 5), (1 / 3,) * 3)
    whole = space().setting(u, BASE).weights
    part = space().setting(u, some).weights
    assert part == pytest.approx([whole[k] / (whole[1] + whole[4] + whole[6]) for k in (1, 4, 6)], abs=1e-12)


def test_simplex_starts_at_the_shares_of_the_clients() -> None:
    prior = tuple((k + 1) / 36 for k in range(CLIENTS))
    over = space(weights={"form": "simplex"})
    base = Round(0, 0.1, tuple(range(CLIENTS)), (5,) * CLIENTS, prior)
    assert over.setting(at(), base).weights == pytest.approx(prior, abs=1e-15)
    assert over.setting(at(weight_0=0.5), base).weights[0] > prior[0]


def test_10_legal_values() -> None:
    def value(key: str, u: float) -> Any:
        setting = space().setting(at(**{key: u}), BASE)
        return {"lr": setting.lr, "local_work": setting.steps[0], "server_lr": setting.knobs["server_lr"]}[key]

    assert value("lr", 0.0) == (5e-4 + 5e-2) / 2 and value("lr", -1.0) == 1e-4 and value("lr", 2.0) == pytest.approx(0.12425)
    for wanted, legal in ((-3.2, 1), (0.49, 1), (1.49, 1), (1.5, 2), (41.6, 42), (21.0, 21)):
        assert value("local_work", (wanted - 21) / 38) == legal, wanted
    assert value("server_lr", -2.0) == 1e-4 and value("server_lr", 0.0) == 1.0
    released = space(server_lr={"low": 0.5, "high": 1.5, "floor": 0.1})
    assert released.setting(at(server_lr=-2.0), BASE).knobs["server_lr"] == 0.1
    log = space(lr={"low": 1e-3, "high": 1e-1, "scale": "log"})
    assert log.setting(at(), BASE).lr == pytest.approx(1e-2) and log.setting(at(lr=0.5), BASE).lr == pytest.approx(1e-1)
    assert space(per_pass=7, local_work={"low": 1, "high": 3, "unit": "epochs"}).setting(at(), BASE).steps == (14,) * CLIENTS


def test_knobs_stay_within_the_bounds_of_their_method() -> None:
    class Options(Named):
        name: str = "x"
        momentum: float = Field(0.5, ge=0, lt=1)
        levels: int = Field(3, ge=2)

    over = space(weights=None, server_lr=None, momentum={"low": 0.0, "high": 0.9}, levels={"low": 2, "high": 9}, method=Options())
    assert [c.name for c in over.coordinates] == ["lr", "local_work", "levels", "momentum"]
    assert over.setting(vector(0, 0, 0, 9.0), BASE).knobs["momentum"] == pytest.approx(1 - 9e-4)
    assert over.setting(vector(0, 0, -9.0, -9.0), BASE).knobs == {"levels": 2.0, "momentum": 0.0}
    assert over.setting(vector(0, 0, 0, 0), BASE).knobs["levels"] == 6.0


def test_per_client_rates_and_work() -> None:
    over = space(
        2,
        lr={"low": 0.1, "high": 0.3, "per_client": True},
        local_work={"low": 1, "high": 9, "per_client": True},
        weights=None,
        server_lr=None,
    )
    base = Round(0, 0.1, (0, 1), (5, 5), (0.25, 0.75))
    setting = over.setting(vector(0.5, -0.5, 0.5, -0.5), base)
    assert setting.lrs == pytest.approx((0.3, 0.1)) and setting.steps == (9, 1)
    assert setting.lr == pytest.approx(0.25 * 0.3 + 0.75 * 0.1) and setting.rate(1) == pytest.approx(0.1)


def test_9_moves_are_bounded() -> None:
    actor = agent("gaussian", init_std=0.108)
    state = actor.start()
    for _ in range(200):
        before = state["params"]["mean"].clone()
        u = before + 0.1
        adv = torch.ones(1, D, dtype=torch.float64)
        actor.improve(state, [{"u": u, "given": {}}], adv)
        assert float((state["params"]["mean"] - before).abs().max()) <= 0.01 + 1e-12
    assert bool((state["params"]["mean"] == 0.5).all()), "a constant sign ends at the clamp"
    network: Any = agent("mlp", zero_init_head=False)
    moved = network.start()
    for i in range(20):
        before = moved["mean"].clone()
        network.draw(moved, Noise(Key(0, "t", i)))
        assert float((moved["mean"] - before).abs().max()) <= 0.01 + 1e-12
    assert sum(p.numel() for p in moved["params"].values()) == 133_764


@pytest.mark.parametrize("name", ["gaussian", "mlp"])
def test_11_spread_of_a_sample(name: str) -> None:
    for std in (0.108, 85**-0.25):
        actor = agent(name, init_std=std)
        assert actor.moments(actor.start())[1].tolist() == pytest.approx([std] * D, rel=1e-5)


def test_adam_is_torchs() -> None:
    weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([weight], lr=0.01, betas=(0.7, 0.7), maximize=True)
    ours: dict[str, Any] = {"w": torch.zeros(5, dtype=torch.float64)}
    held: dict[str, Any] = {}
    for i in range(20):
        g = torch.randn(5, generator=Key(i, "g").generator(), dtype=torch.float64)
        weight.grad = g.clone()
        theirs.step()
        adam_ascent(ours, {"w": g}, held, 0.01, 0.7, 0.7)
    assert torch.allclose(ours["w"], weight.detach(), atol=1e-14)


def test_antithetic_noise_mirrors() -> None:
    plain, mirrored = Noise(Key(0, "a")), Noise(Key(0, "a"), -1)
    assert torch.equal(plain.normal(4), -mirrored.normal(4))
    assert torch.allclose(plain.uniform(4), 1 - mirrored.uniform(4))


def test_dirichlet_moments_and_draws() -> None:
    law = dirichlet.start(4, 5.0)
    assert dirichlet.concentration(law).tolist() == pytest.approx([5.0] * 4)
    mean, std = dirichlet.moments(law)
    assert mean.tolist() == pytest.approx([0.25] * 4) and std[0] ** 2 == pytest.approx(0.25 * 0.75 / 21)
    drawn = torch.stack([dirichlet.draw(law, Noise(Key(0, "d", i))) for i in range(3000)])
    assert torch.allclose(drawn.sum(1), torch.ones(3000, dtype=torch.float64)) and float(drawn.min()) > 0
    assert drawn.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.01)
    before = dirichlet.concentration(law).clone()
    dirichlet.improve(law, [vector(0.7, 0.1, 0.1, 0.1)], vector(1.0), 0.01, 0.7, 0.7)
    assert dirichlet.concentration(law)[0] > before[0] and bool((dirichlet.concentration(law)[1:] < before[1:]).all())


def test_natural_gradient_leaves_dead_coordinates() -> None:
    actor = agent("gaussian", space(2, NoOptions()), natural_gradient=True, natural_lr=1.0)
    state = actor.start()
    samples = [{"u": vector(0.2, 0, 0, 0, 0), "given": {}}, {"u": vector(-0.2, 0, 0, 0, 0), "given": {}}]
    adv = advantages([0.3, 0.1])[:, None].expand(-1, 5)
    actor.improve(state, samples, adv)
    assert state["params"]["mean"].tolist() == pytest.approx([0.02, 0, 0, 0, 0])
