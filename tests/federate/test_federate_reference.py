"""Every method against a plain reference in double precision, written from the equations of the papers and from nothing here.

A tiny network with minibatches, a schedule, unequal weights; clients with equal and unequal numbers of steps, all of them or some.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xutrain.methods.federate.simulation import Simulation

K, D, ROUNDS = 5, 26, 5
WEIGHTS = [0.1, 0.3, 0.2, 0.15, 0.25]
SOME = [(0, 2), (1,), (0, 1, 3, 4), (2, 4), (1, 3)]
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {"server_lr": 0.7, "local_momentum": 0.5},
    "fedavg_sm": {"server_momentum": 0.8, "server_lr": 0.6},
    "fedavg_lm": {"local_momentum": 0.7, "server_lr": 0.9},
    "fedavg_lm_z": {"local_momentum": 0.7},
    "fedavg_slm": {"local_momentum": 0.7, "server_momentum": 0.6},
    "fedavg_slm_z": {"local_momentum": 0.7, "server_momentum": 0.6, "server_lr": 0.5},
    "domo": {"local_momentum": 0.7, "server_momentum": 0.6, "server_lr": 0.5},
    "domo_s": {"local_momentum": 0.7, "server_momentum": 0.6, "server_lr": 0.5, "beta": 1.3},
    "domo_cv": {"local_momentum": 0.3, "server_momentum": 0.6, "server_lr": 0.5, "beta": 0.4},
    "fedprox": {"mu": 0.3, "local_momentum": 0.2, "server_lr": 0.8},
    "scaffold": {"server_lr": 0.8},
    "scaffold 1": {"option": 1},
    "mime": {"momentum": 0.7},
    "mime_lite": {"momentum": 0.7},
    "fednova": {"local_momentum": 0.6, "server_lr": 0.9},
    "fedcm": {"a": 0.3, "server_lr": 0.9},
    "fedadam": {"beta1": 0.8, "beta2": 0.9, "tau": 0.01, "server_lr": 0.05},
    "fedyogi": {"beta1": 0.8, "beta2": 0.9, "tau": 0.01, "server_lr": 0.05},
    "fedadagrad": {"beta1": 0.8, "tau": 0.01, "server_lr": 0.05},
}


class Net:
    """A client: 3-4-2 perceptron on samples of its own, a minibatch of three a step."""

    def __init__(self, k: int) -> None:
        draw = torch.Generator().manual_seed(100 + k)
        self.k, self.n, self.round = k, 7 + k, 0
        self.x = torch.randn(self.n, 3, generator=draw, dtype=torch.float64)
        self.y = torch.randint(0, 2, (self.n,), generator=draw)

    def _gradient(self, point: Tensor, rows: Tensor) -> Tensor:
        w = point.detach().clone().requires_grad_()
        hidden = torch.tanh(self.x[rows] @ w[:12].view(4, 3).T + w[12:16])
        loss = torch.nn.functional.cross_entropy(hidden @ w[16:24].view(2, 4).T + w[24:], self.y[rows])
        return torch.autograd.grad(loss, w)[0]

    def gradient(self, point: Tensor, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.round * 1000 + step * 10 + self.k)
        return self._gradient(point, torch.randperm(self.n, generator=draw)[:3])

    def full_gradient(self, point: Tensor) -> Tensor:
        return self._gradient(point, torch.arange(self.n))


def rate(r: int) -> float:
    return 0.3 / (1 + r)


def reference(name: str, o: dict[str, Any], steps: list[int], chosen: list[tuple[int, ...]]) -> list[Tensor]:
    """x_1, ..., x_R. One branch a method, in the papers' symbols."""
    nets, x = [Net(k) for k in range(K)], torch.linspace(-1, 1, D, dtype=torch.float64)
    zero = torch.zeros_like(x)
    alpha, mu_s, mu_l = o.get("server_lr", 1.0), o.get("server_momentum", 0.0), o.get("local_momentum", 0.0)
    beta, b = o.get("beta", alpha * mu_s), o.get("momentum", 0.0)
    m, s, u, c, buffer, controls = zero, zero, zero, zero, zero, [zero] * K
    v = torch.full_like(x, o.get("tau", 0.0) ** 2)
    found = []
    for r, clients in enumerate(chosen):
        eta, whole = rate(r), sum(WEIGHTS[k] for k in clients)
        p = {k: WEIGHTS[k] / whole for k in clients}
        mean_steps = sum(p[k] * steps[k] for k in clients)
        for net in nets:
            net.round = r
        full = sum(p[k] * nets[k].full_gradient(x) for k in clients) if "mime" in name else zero
        ends, directions, buffers, fresh = {}, {}, {}, {}
        for k in clients:
            y = x - eta * beta * mean_steps * m if name in ("domo", "domo_cv") else x
            held = buffer if name in ("fedavg_lm", "fedavg_slm") else zero
            total = path = zero
            for step in range(steps[k]):
                g = nets[k].gradient(y, step)
                path = path + g
                if name in ("scaffold", "domo_cv"):
                    g = g - controls[k] + c
                elif name == "fedprox":
                    g = g + o["mu"] * (y - x)
                elif name == "fedcm":
                    g = o["a"] * g + (1 - o["a"]) * m
                elif name == "mime":
                    g = (1 - b) * (g - nets[k].gradient(x, step) + full) + b * s
                elif name == "mime_lite":
                    g = (1 - b) * g + b * s
                held = mu_l * held + g
                total = total + held
                y = y - eta * held - (eta * beta * m if name == "domo_s" else zero)
            ends[k], directions[k], buffers[k] = y, total / steps[k], held
            if name == "scaffold":
                fresh[k] = nets[k].full_gradient(x) if o.get("option") == 1 else controls[k] - c + (x - y) / (steps[k] * eta)
            elif name == "domo_cv":
                fresh[k] = path / steps[k]
        delta = sum(p[k] * (ends[k] - x) for k in clients)
        if name in ("fedadam", "fedyogi", "fedadagrad"):
            square = delta**2
            u = o["beta1"] * u + (1 - o["beta1"]) * delta
            if name == "fedadam":
                v = o["beta2"] * v + (1 - o["beta2"]) * square
            else:
                v = v + square if name == "fedadagrad" else v - (1 - o["beta2"]) * square * torch.sign(v - square)
            x = x + alpha * u / (v.sqrt() + o["tau"])
        elif name == "fednova":
            a = {k: sum(mu_l**j for i in range(steps[k]) for j in range(i + 1)) for k in clients}
            d = sum(p[k] * (x - ends[k]) / (eta * a[k]) for k in clients)
            x = x - alpha * eta * sum(p[k] * a[k] for k in clients) * d
        elif name in ("fedavg", "fedavg_lm", "fedavg_lm_z", "fedprox", "scaffold", "mime", "mime_lite"):
            x, s = x + alpha * delta, (1 - b) * full + b * s
        else:
            m = mu_s * m + sum(p[k] * directions[k] for k in clients)
            x = x - alpha * eta * mean_steps * m
        buffer = sum(p[k] * buffers[k] for k in clients)
        for k, new in fresh.items():
            c = c + WEIGHTS[k] * (new - controls[k])
            controls[k] = new
        found.append(x)
    return found


@pytest.mark.parametrize("steps", [[4] * K, [4, 1, 6, 3, 2]], ids=["equal", "own"])
@pytest.mark.parametrize("chosen", [[tuple(range(K))] * ROUNDS, SOME], ids=["all", "some"])
@pytest.mark.parametrize("case", CASES)
def test_every_method_follows_its_equations(case: str, chosen: list[tuple[int, ...]], steps: list[int]) -> None:
    name, options = case.split()[0], CASES[case]
    expected = reference(name, options, steps, chosen)
    nets = [Net(k) for k in range(K)]
    start = torch.linspace(-1, 1, D, dtype=torch.float64)
    run = Simulation(name, nets, start=start, steps=steps, lr=rate, weights=WEIGHTS, partial=chosen is SOME, **options)
    for r in range(ROUNDS):
        for net in nets:
            net.round = r
        run.one(chosen=chosen[r])
        assert torch.allclose(run.x, expected[r], rtol=0, atol=1e-13), r


def test_the_reference_moves_and_tells_the_methods_apart() -> None:
    ends = {case: reference(case.split()[0], o, [4] * K, SOME)[-1] for case, o in CASES.items()}
    apart = [float((a - b).abs().max()) for i, a in enumerate(ends.values()) for b in list(ends.values())[:i]]
    assert min(apart) > 1e-4
