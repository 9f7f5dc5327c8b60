"""The methods on quadratics in double precision: limits, fixed points, rates and sequences that must hold exactly."""

from __future__ import annotations

import cmath
import random

import pytest
import torch

from xutrain.methods.federate.fednova import gain
from xutrain.methods.federate.simulation import Linear, Quadratic, Simulation, optimum, quadratics
from xutrain.registry import entries

#: methods that want a data set of sites or a net with norm layers: tests/federate/test_fedsm_*.py
ELSEWHERE = ("fedsm", "fedbn")
ALL = [e.name for e in entries("method", "federate") if e.module.startswith("xutrain.methods.federate") and e.name not in ELSEWHERE]
EXACT = 1e-14


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = EXACT) -> None:
    assert float((a - b).abs().max()) <= tolerance


def mean_gradient(problems: list[Quadratic], x: torch.Tensor) -> torch.Tensor:
    return sum(p.gradient(x, 0) for p in problems) / len(problems)


def test_fedavg_is_the_mean_of_the_models() -> None:  # T1
    problems = quadratics()
    s = Simulation("fedavg", problems)
    for _ in range(3):
        ends = []
        for problem in problems:
            y = s.x.clone()
            for _ in range(5):
                y = y - 0.05 * problem.gradient(y, 0)
            ends.append(y)
        s.one()
        close(s.x, sum(ends) / len(ends))


def test_one_local_step_is_heavy_ball_and_nesterov() -> None:  # T2
    problems = quadratics()
    ball = Simulation("fedavg_sm", problems, steps=1)
    outer = Simulation("domo", problems, steps=1)
    x, m = ball.x.clone(), torch.zeros(6, dtype=torch.float64)
    z, v = outer.x.clone(), torch.zeros(6, dtype=torch.float64)
    for _ in range(20):
        m = 0.9 * m + mean_gradient(problems, x)
        x = x - 0.05 * m
        v = 0.9 * v - 0.05 * mean_gradient(problems, z + 0.9 * v)
        z = z + v
        close(ball.run(1), x)
        close(outer.run(1), z, 2e-14)


def test_domo_is_an_outer_nesterov_optimizer() -> None:  # T3
    problems, mu, alpha, lr, steps = quadratics(), 0.8, 0.7, 0.05, 6
    s = Simulation("domo", problems, steps=steps, lr=lr, server_lr=alpha, server_momentum=mu, local_momentum=0.6)
    y = torch.nn.Parameter(s.x.clone())
    torch_nesterov = torch.optim.SGD([y], lr=alpha, momentum=mu, nesterov=True)
    for _ in range(15):
        moved = s.x - lr * alpha * mu * steps * s.server["momentum"]
        close(moved, y.data, 5e-14)
        ends = []
        for problem in problems:
            local, buffer = y.data.clone(), torch.zeros(6, dtype=torch.float64)
            for _ in range(steps):
                buffer = 0.6 * buffer + problem.gradient(local, 0)
                local = local - lr * buffer
            ends.append(local)
        y.grad = y.data - sum(ends) / len(ends)
        torch_nesterov.step()
        s.one()


def test_constant_gradients_make_fusion_invisible() -> None:  # T4
    slopes = [Linear(torch.randn(6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)) for k in range(4)]
    reference = Simulation("fedavg_slm_z", slopes, local_momentum=0.6).run(8)
    for name in ("domo", "domo_s"):
        for beta in (0.0, 0.5, 2.0):
            close(Simulation(name, slopes, local_momentum=0.6, beta=beta).run(8), reference, 1e-13)


def test_gain_of_the_local_buffer() -> None:  # T5
    slope, mu, steps = torch.arange(1.0, 7.0, dtype=torch.float64), 0.9, 7
    zeroed = Simulation("fedavg_lm_z", [Linear(slope)] * 3, local_momentum=mu, steps=steps)
    zeroed.run(2)
    gamma = (1 - mu * (1 - mu**steps) / (steps * (1 - mu))) / (1 - mu)
    close(zeroed.replies[0].tensors["update"], slope * gamma, 1e-13)
    assert gamma == pytest.approx(gain(steps, mu) / steps)
    averaged = Simulation("fedavg_lm", [Linear(slope)] * 3, local_momentum=mu, steps=steps)
    averaged.run(60)
    close(averaged.replies[0].tensors["update"], slope / (1 - mu), 1e-12)


def test_fixed_points() -> None:  # T6
    problems = quadratics(4, seed=3)
    best = optimum(problems)

    def limit(name: str, rounds: int = 2000, **options: float) -> torch.Tensor:
        return Simulation(name, problems, server_lr=0.5, **options).run(rounds)

    plain = limit("fedavg")
    for name, options in (
        ("fedavg_sm", {}),
        ("domo", {"local_momentum": 0.0}),
        ("domo_s", {"local_momentum": 0.0, "beta": 0.3}),
    ):
        close(limit(name, **options), plain, 1e-13)
    heavy = limit("fedavg_lm_z", local_momentum=0.6)
    for name in ("fedavg_slm_z", "domo", "domo_s"):
        close(limit(name, local_momentum=0.6, server_momentum=0.8), heavy, 1e-13)
    assert float((plain - best).norm()) > 1e-3
    assert float((heavy - best).norm()) > float((plain - best).norm())
    for option in (1, 2):
        close(limit("scaffold", option=option), best, 1e-13)
    close(Simulation("mime", problems, momentum=0.5).run(2000), best, 1e-13)
    close(limit("domo_cv", local_momentum=0.0), best, 1e-13)
    close(limit("domo_cv", local_momentum=0.6), best, 1e-13)


def test_control_variates_respect_weights_and_absence() -> None:
    problems, weights = quadratics(4, seed=3), [0.4, 0.3, 0.2, 0.1]
    best = optimum(problems, weights)
    close(Simulation("scaffold", problems, weights=weights).run(1500), best, 1e-12)
    s = Simulation("scaffold", problems, weights=weights, partial=True)
    for r in range(4000):
        s.one(sorted({r % 4, (r * 7 + 1) % 4}))
    assert float((s.x - best).norm()) < 1e-9
    held = sum(w * c["control"] for w, c in zip(weights, s.clients, strict=True))
    close(s.server["control"], held, 1e-12)


def test_domo_with_control_variates_is_fast_and_unbiased() -> None:
    problems = quadratics(4, seed=3)
    best = optimum(problems)
    options = {"local_momentum": 0.6, "server_lr": 0.5}
    slow = float((Simulation("domo_cv", problems, beta=0.0, **options).run(60) - best).norm())
    fast = float((Simulation("domo_cv", problems, **options).run(60) - best).norm())
    assert fast < slow / 20
    close(
        Simulation("domo_cv", problems, local_momentum=0.0, server_momentum=0.0, beta=0.0).run(9), Simulation("scaffold", problems).run(9)
    )


def damping(a: float, lr: float, steps: int, alpha: float, mu: float, beta: float, scattered: bool) -> list[complex]:
    """Eigenvalues of the pair (x, eta P m) for a scalar quadratic of curvature a."""
    h = 1 - (1 - lr * a) ** steps
    hs = (1 - h / (lr * a * steps)) if scattered else h
    trace, det = 1 - alpha * h + mu - beta * hs, mu - beta * hs
    root = cmath.sqrt(trace * trace - 4 * det)
    return [(trace + root) / 2, (trace - root) / 2]


@pytest.mark.parametrize("name", ["domo", "domo_s"])
@pytest.mark.parametrize("beta", [0.0, 0.45, 0.9])
def test_damping_law(name: str, beta: float) -> None:  # T7
    a, lr, steps = 1.0, 0.02, 5
    scalar = [Quadratic(torch.tensor([[a]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))]
    start = torch.ones(1, dtype=torch.float64)
    s = Simulation(name, scalar, start=start, steps=steps, lr=lr, local_momentum=0.0, server_momentum=0.9, beta=beta)
    path = [float(s.x)] + [float(s.run(1)) for _ in range(40)]
    first, second = damping(a, lr, steps, 1.0, 0.9, beta, name == "domo_s")
    # a two-dimensional linear recurrence satisfies its characteristic equation
    for p, q, r in zip(path, path[1:], path[2:], strict=False):
        assert abs(r - (first + second).real * q + (first * second).real * p) < 1e-14
    assert abs(first) == pytest.approx(abs(second))  # complex pair: both have modulus sqrt(det)


def test_stability_region_matches_the_eigenvalues() -> None:  # T7
    draw = random.Random(1)
    for _ in range(2000):
        h, mu, alpha, beta = draw.uniform(0.01, 1.5), draw.uniform(0, 0.99), draw.uniform(0.05, 3), draw.uniform(0, 3)
        trace, det = 1 - alpha * h + mu - beta * h, mu - beta * h
        root = cmath.sqrt(trace * trace - 4 * det)
        radius = max(abs(trace + root), abs(trace - root)) / 2
        stable = abs(mu - beta * h) < 1 and (alpha + 2 * beta) * h < 2 * (1 + mu)
        if abs(radius - 1) > 1e-9:
            assert (radius < 1) == stable


def test_virtual_sequence() -> None:  # T8
    problems, mu, alpha, lr, steps = quadratics(), 0.8, 0.6, 0.05, 6
    for beta in (0.0, 0.4, alpha * mu / (1 - mu)):
        s = Simulation("domo", problems, steps=steps, lr=lr, server_lr=alpha, server_momentum=mu, local_momentum=0.5, beta=beta)
        pull = alpha * lr * steps * mu / (1 - mu)
        for _ in range(12):
            z = s.x - pull * s.server["momentum"]
            start = s.x - lr * beta * steps * s.server["momentum"]
            gap = abs(alpha * mu / (1 - mu) - beta) * lr * steps * float(s.server["momentum"].norm())
            assert float((z - start).norm()) == pytest.approx(gap, abs=1e-12)
            s.one()
            mean = sum(r.tensors["update"] for r in s.replies) / len(problems)
            close(s.x - pull * s.server["momentum"], z - alpha * lr * steps / (1 - mu) * mean, 1e-13)


@pytest.mark.parametrize("name", ["domo", "domo_s", "fedcm", "domo_cv"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_momentum_is_inferred_by_the_clients(name: str, dtype: torch.dtype, tolerance: float) -> None:  # T9
    problems = quadratics()
    for p in problems:
        p.curvature, p.centre = p.curvature.to(dtype), p.centre.to(dtype)
    schedule = [0.08, 0.08, 0.02, 0.02, 0.005, 0.05]
    s = Simulation(name, problems, lr=lambda r: schedule[r], dtype=dtype)
    seen = []
    inferred = s.method.server_direction
    s.method.server_direction = lambda state, plan: seen.append(inferred(state, plan)) or seen[-1]
    for _ in range(6):
        momentum = s.server["momentum"].clone()
        seen.clear()
        s.one()
        for guess in seen:
            guess = torch.zeros_like(momentum) if guess is None else guess
            assert float((guess - momentum).norm()) <= tolerance * max(1.0, float(momentum.norm()))


def test_zero_lr_is_sent_not_divided() -> None:
    schedule = [0.05, 0.0, 0.0, 0.05]
    s = Simulation("domo", quadratics(), lr=lambda r: schedule[r])
    costs = []
    for r in range(4):
        before = dict(s.sent)
        s.one()
        costs.append((s.sent["down"] - before["down"]) // 5)
        assert torch.isfinite(s.x).all(), r
    assert costs == [6, 6, 12, 12]
    expected = [s.method.traffic(6, None if r == 0 else schedule[r - 1]).down for r in range(4)]
    assert costs == [sum(parts.values()) for parts in expected]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_traffic_is_what_the_closed_form_says(name: str, partial: bool) -> None:  # T10
    s = Simulation(name, quadratics(), partial=partial)
    if s.method.silent:
        pytest.skip("a reference without a network")
    for r in range(3):
        before = dict(s.sent)
        s.one()
        traffic = s.method.traffic(6, None if r == 0 else 0.05)
        assert s.sent["down"] - before["down"] == 5 * sum(traffic.down.values())
        assert s.sent["up"] - before["up"] == 5 * sum(traffic.up.values())


def test_domo_sends_no_more_than_fedavg() -> None:  # T10
    def cost(name: str, **options: bool) -> dict[str, int]:
        s = Simulation(name, quadratics(), **options)
        s.run(4)
        return s.sent

    base = cost("fedavg")
    assert cost("domo") == cost("domo_s") == cost("fedavg_slm_z") == cost("fedavg_sm") == cost("fedcm") == base
    for name in ("fedavg_lm", "fedavg_slm", "scaffold", "domo_cv"):
        assert cost(name) == {"down": 2 * base["down"], "up": 2 * base["up"]}
    assert cost("mime") == {"down": 3 * base["down"], "up": 2 * base["up"]}


@pytest.mark.parametrize("name", ALL)
def test_order_of_clients_does_not_matter(name: str) -> None:  # T11
    ordered, shuffled = Simulation(name, quadratics()), Simulation(name, quadratics())
    for _ in range(5):
        ordered.one()
        shuffled.one(order=[3, 1, 4, 0, 2])
    close(ordered.x, shuffled.x, 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_clients_keep_their_plans_to_themselves(name: str) -> None:
    s, spoiled = Simulation(name, quadratics()), Simulation(name, quadratics())
    step = spoiled.method.step

    def spoil(state, plan, problem):  # type: ignore[no-untyped-def]
        reply = step(state, plan, problem)
        for tensor in plan.tensors.values():
            tensor.fill_(float("nan"))
        plan.knobs["beta"] = 7.0
        return reply

    if name not in ("local", "mime"):  # these keep what they were sent as their own
        spoiled.method.step = spoil
    for _ in range(3):
        s.one()
        spoiled.one()
    close(s.x, spoiled.x, 0.0)


def test_limits_at_beta_zero_and_first_round() -> None:
    problems = quadratics()
    reference = Simulation("fedavg_slm_z", problems, local_momentum=0.6)
    fused = [Simulation(name, problems, local_momentum=0.6) for name in ("domo", "domo_s")]
    bare = [Simulation(name, problems, local_momentum=0.6, beta=0.0) for name in ("domo", "domo_s")]
    reference.one()
    for s in fused + bare:
        s.one()
        close(s.x, reference.x, 0.0)
    reference.run(6)
    for s in bare:
        close(s.run(6), reference.x, 0.0)
    one_step = Simulation("fedavg_slm_z", problems, steps=1).run(7)
    close(Simulation("domo_s", problems, steps=1).run(7), one_step, 1e-15)
    assert float((Simulation("domo", problems, steps=1).run(7) - one_step).norm()) > 1e-4


def test_zero_gradients_coast() -> None:
    still = [Linear(torch.zeros(6, dtype=torch.float64))] * 3
    s = Simulation("domo", still, server_momentum=0.8)
    m = torch.arange(6.0, dtype=torch.float64)
    s.server["momentum"] = m.clone()
    start = s.x.clone()
    s.run(400)
    close(s.x, start - 0.05 * 5 * 0.8 / 0.2 * m, 1e-12)


@pytest.mark.parametrize(
    ("name", "options", "same", "same_options"),
    [
        ("fedprox", {"mu": 0.0}, "fedavg", {}),
        ("fedcm", {"a": 1.0}, "fedavg", {}),
        ("fednova", {}, "fedavg", {}),
        ("fednova", {"local_momentum": 0.6}, "fedavg_lm_z", {"local_momentum": 0.6}),
        ("mime_lite", {"momentum": 0.0}, "fedavg", {}),
        ("fedavg_sm", {"server_momentum": 0.0}, "fedavg", {}),
        ("fedavg_lm", {"local_momentum": 0.0}, "fedavg", {}),
        ("fedavg_slm", {"local_momentum": 0.0}, "fedavg_sm", {}),
        ("fedadam", {"beta1": 0.0, "beta2": 0.0, "tau": 1e6, "server_lr": 2e6}, "fedavg", {"server_lr": 2.0}),
    ],
)
def test_degenerate_settings(name: str, options: dict, same: str, same_options: dict) -> None:
    problems = quadratics()
    close(
        Simulation(name, problems, **options).run(4), Simulation(same, problems, **same_options).run(4), 1e-6 if "fedad" in name else 1e-14
    )


def test_server_optimizers_follow_their_rules() -> None:
    problems = quadratics()
    for name, rule in (
        ("fedadam", lambda v, q: 0.99 * v + 0.01 * q),
        ("fedyogi", lambda v, q: v - 0.01 * q * torch.sign(v - q)),
        ("fedadagrad", lambda v, q: v + q),
    ):
        s = Simulation(name, problems)
        x, u, v = s.x.clone(), torch.zeros(6, dtype=torch.float64), torch.full((6,), 1e-6, dtype=torch.float64)
        for _ in range(5):
            delta = Simulation("fedavg", problems, start=x).run(1) - x
            u = 0.9 * u + 0.1 * delta
            v = rule(v, delta * delta)
            x = x + 0.1 * u / (v.sqrt() + 1e-3)
            s.one()
            close(s.x, x, 1e-12)


def test_fednova_with_unequal_work_has_no_preference() -> None:
    """With commuting small steps FedNova's limit ignores how many steps each client does; FedAvg's does not."""
    problems, steps = quadratics(3, seed=5), (1, 4, 12)
    best = optimum(problems)
    nova = Simulation("fednova", problems, steps=steps, lr=0.002).run(4000)
    plain = Simulation("fedavg", problems, steps=steps, lr=0.002).run(4000)
    assert float((nova - best).norm()) < 0.1 * float((plain - best).norm())


def test_unequal_steps_infer_the_same_momentum() -> None:
    s = Simulation("domo", quadratics(3), steps=(2, 5, 9), weights=(0.2, 0.3, 0.5))
    sent = Simulation("domo", quadratics(3), steps=(2, 5, 9), weights=(0.2, 0.3, 0.5), partial=True)
    close(s.run(10), sent.run(10), 1e-13)


def test_adaptive_beta_stays_between_none_and_full_fusion() -> None:
    s = Simulation("domo", quadratics(), adaptive=True, local_momentum=0.6)
    seen = []
    for _ in range(30):
        s.one()
        seen.append(s.server["beta"])
    assert all(0.0 <= beta <= 0.9 for beta in seen) and len(set(seen)) > 5


def test_knobs_override_options() -> None:
    fixed = Simulation("domo", quadratics(), beta=0.2, server_lr=0.5)
    steered = Simulation("domo", quadratics())
    from dataclasses import replace

    steered.method.configure = lambda server, round: replace(round, knobs={"beta": 0.2, "server_lr": 0.5})
    close(fixed.run(6), steered.run(6), 0.0)


def test_local_and_central_references() -> None:
    problems = quadratics(3)
    alone = Simulation("local", problems, local_momentum=0.5)
    alone.run(400)
    for state, problem in zip(alone.clients, problems, strict=True):
        close(alone.method.served(alone.server, state), problem.centre, 1e-12)
    whole = Simulation("central", problems[:1], local_momentum=0.5, steps=5)
    whole.run(20)
    x, b = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for _ in range(100):
        b = 0.5 * b + problems[0].gradient(x, 0)
        x = x - 0.05 * b
    close(whole.x, x, 1e-13)


def test_fedavg_with_unequal_work_still_averages_models() -> None:
    problems, steps, weights = quadratics(3), (1, 4, 7), (0.5, 0.3, 0.2)
    s = Simulation("fedavg", problems, steps=steps, weights=weights)
    ends = []
    for problem, count in zip(problems, steps, strict=True):
        y = s.x.clone()
        for _ in range(count):
            y = y - 0.05 * problem.gradient(y, 0)
        ends.append(y)
    s.one()
    close(s.x, sum(w * y for w, y in zip(weights, ends, strict=True)))
