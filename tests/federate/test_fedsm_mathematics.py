"""SoftPull, FedSM and the personalised methods against closed forms in double precision (F1 to F8 of the method's specification)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xutrain.errors import RecipeError
from xutrain.loops.site_eval import SHARED, Answer, choose, mean_of, spoken
from xutrain.methods.federate.base import Committee, Federation, Plan, Reply, Round
from xutrain.methods.federate.fedsm import FedSM
from xutrain.methods.federate.local_steps import adam
from xutrain.methods.federate.prr_fl import as_matrix, as_weight, exchange_frequencies, window
from xutrain.methods.federate.simulation import Linear, Quadratic, Simulation, quadratics
from xutrain.methods.federate.softpull import SoftPull, rho, shrinkage, softpull

DOUBLE = torch.float64


def models(clients: int = 4, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(50, generator=generator, dtype=dtype) for _ in range(clients)]


def deviation(found: list[Tensor]) -> list[Tensor]:
    mean = torch.stack(found).mean(0)
    return [m - mean for m in found]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (DOUBLE, 1e-12)])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.25, 0.7, 0.9, 1.0])
def test_softpull_is_doubly_stochastic(lam: float, dtype: torch.dtype, tolerance: float) -> None:  # F1
    old = models(dtype=dtype)
    new = softpull(old, lam)
    assert float((torch.stack(new).mean(0) - torch.stack(old).mean(0)).abs().max()) <= tolerance
    for a, b in zip(deviation(old), deviation(new), strict=True):
        assert float((b - rho(4, lam) * a).abs().max()) <= tolerance
    for k in range(4):  # the formula as written
        others = sum(old[j] for j in range(4) if j != k)
        assert float((new[k] - (lam * old[k] + (1 - lam) / 3 * others)).abs().max()) <= tolerance


def test_softpull_limits() -> None:  # F1, F8
    old = models()
    assert all(torch.equal(a, b) for a, b in zip(softpull(old, 1.0), old, strict=True))
    level = softpull(old, 0.25)
    assert all(torch.equal(level[0], m) for m in level)
    two = softpull([torch.tensor([0.0]), torch.tensor([10.0])], 0.75)
    assert [float(m) for m in two] == [2.5, 7.5]
    assert torch.equal(softpull(old[:1], 0.3)[0], old[0]) and rho(1, 0.3) == 1.0
    sized = softpull(old, 0.6, [0.1, 0.2, 0.3, 0.4])
    assert torch.allclose(sized[0], 0.6 * old[0] + 0.4 * (0.2 * old[1] + 0.3 * old[2] + 0.4 * old[3]) / 0.9, atol=1e-14)
    assert [round(rho(3, x), 2) for x in (0.7, 0.8)] == [0.55, 0.7] and [round(rho(6, x), 2) for x in (0.7, 0.8)] == [0.64, 0.76]


def test_a_lambda_below_1_over_k_is_remarked() -> None:
    for lam, said in ((0.2, True), (0.25, False), (0.7, False)):
        method = SoftPull(SoftPull.Options(name="softpull", lam=lam), Federation(4, (0.25,) * 4))
        assert bool(method.notes()) is said


@pytest.mark.parametrize("lam", [0.3, 0.7, 0.9])
def test_the_fixed_point_on_quadratics(lam: float) -> None:  # F5
    a, lr, steps, clients = 1.3, 0.1, 5, 4
    centres = models(clients)
    problems = [Quadratic(a * torch.eye(50, dtype=DOUBLE), b) for b in centres]
    s = Simulation("softpull", problems, start=torch.zeros(50, dtype=DOUBLE), steps=steps, lr=lr, lam=lam)
    s.run(200)
    shrunk, mean = shrinkage(clients, lam, a, lr, steps), torch.stack(centres).mean(0)
    if lam == 0.7:
        assert abs(shrunk - 0.42934) < 5e-6
    kept = (1 - lr * a) ** steps
    c = a * (1 - rho(clients, lam)) / (rho(clients, lam) * (1 - kept))
    found = s.server["personal"]
    common = torch.stack(found).mean(0)
    for w, b in zip(found, centres, strict=True):
        assert float((w - (mean + shrunk * (b - mean))).abs().max()) < 1e-12
        assert float((a * (w - b) + c * (w - common)).abs().max()) < 1e-11  # stationary for sum F + c/2 sum |w - mean|^2


def test_the_knob_runs_from_fedavg_to_local() -> None:  # F5
    values = [shrinkage(4, lam, 1.3, 0.1, 5) for lam in (0.25, 0.4, 0.6, 0.8, 1.0)]
    assert values == sorted(values) and values[0] == 0.0 and values[-1] == pytest.approx(1.0)


# A problem with a selector: sites are told apart by features, a linear softmax learns it


@dataclass
class Site:
    """Samples (n, d) of client ``label`` with logistic targets; ``of`` is softmax regression on the client's number."""

    inputs: Tensor
    targets: Tensor
    label: int
    clients: int
    batch: int = 10
    held: Any = None
    taken: int = field(default=0)

    def rows(self, step: int) -> Tensor:
        n = len(self.inputs)
        per_pass = n // self.batch
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * self.label + self.taken // per_pass))
        at = (self.taken % per_pass) * self.batch
        return order[at : at + self.batch]

    def gradient(self, point: Tensor, step: int) -> Tensor:
        rows = self.rows(step)
        self.taken += 1
        return self.slope(point, rows)

    def slope(self, point: Tensor, rows: Tensor) -> Tensor:
        x, y = self.inputs[rows], self.targets[rows]
        return x.T @ (torch.sigmoid(x @ point) - y) / len(rows)

    def full_gradient(self, point: Tensor) -> Tensor:
        return self.slope(point, torch.arange(len(self.inputs)))

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        if self.held is None:
            return {}
        x, y = self.held
        return {"accuracy": float((((x @ point) > 0).to(DOUBLE) == y).double().mean())}

    def of(self, name: str) -> Selector:
        assert name == "selector"
        return Selector(self)


@dataclass
class Selector:
    site: Site

    def full_gradient(self, point: Tensor) -> Tensor:
        x, k = self.site.inputs, self.site.clients
        p = torch.softmax(x @ point.view(x.shape[1], k), dim=1)
        p[:, self.site.label] -= 1
        return (x.T @ p / len(x)).reshape(-1)

    def gradient(self, point: Tensor, step: int) -> Tensor:
        return self.full_gradient(point)

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        if self.site.held is None:
            return {}
        x = self.site.held[0]
        return {"accuracy": float(((x @ point.view(x.shape[1], -1)).argmax(1) == self.site.label).double().mean())}


def toy(seed: int = 0, counts: tuple[int, ...] = (60, 90, 120), tests: int = 500) -> list[Site]:
    """Three features that tell the sites apart; labels by a direction of the site's own in five other features."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(5, generator=generator, dtype=DOUBLE)
    made = []
    for k, n in enumerate(counts):
        own = base + 1.6 * torch.randn(5, generator=generator, dtype=DOUBLE)

        def draw(count: int, k: int = k, own: Tensor = own) -> tuple[Tensor, Tensor]:
            where = torch.zeros(count, 3, dtype=DOUBLE) + 0.3 * torch.randn(count, 3, generator=generator, dtype=DOUBLE)
            where[:, k] += 1.5
            x = torch.randn(count, 5, generator=generator, dtype=DOUBLE)
            return torch.cat([where, x], 1), (x @ own > 0).to(DOUBLE)

        x, y = draw(n)
        made.append(Site(x, y, k, len(counts), held=draw(tests)))
    return made


class FedSMSimulation(Simulation):
    """FedSM in memory, local Adam, a linear selector."""

    def __init__(self, problems: list[Any], optimizer: str = "adam", size: int = 8, rounds: int = 60, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in list(kwargs) if k in FedSM.Options.model_fields}
        super().__init__("softpull", problems, start=torch.zeros(size, dtype=DOUBLE), **kwargs)
        phi = torch.zeros(size * len(problems), dtype=DOUBLE)
        federation = Federation(len(problems), self.weights, networks={"selector": phi}, optimizer=optimizer, rounds=rounds)
        self.method = FedSM(FedSM.Options(name="fedsm", **options), federation)
        self.server = self.method.server_state(torch.zeros(size, dtype=DOUBLE))


def test_aggregation_weighs_steps_and_softpull_does_not() -> None:  # F3
    method = FedSM(FedSM.Options(name="fedsm", lam=0.75, select=False), Federation(2, (0.5, 0.5), networks={"selector": torch.zeros(2)}))
    server = method.server_state(torch.zeros(1))
    zero = torch.zeros(2)
    replies = [
        Reply(
            {"model": torch.tensor([d]), "personal": torch.tensor([w]), "selector": zero, "moments": torch.zeros(4)}, client=k, weight=0.5
        )
        for k, (d, w) in enumerate(((0.0, 0.0), (8.0, 10.0)))
    ]
    method.merge(server, Round(0, 0.1, (0, 1), (1, 3), (0.5, 0.5)), replies)
    assert float(server["model"]) == 6.0
    assert [float(m) for m in server["personal"]] == [2.5, 7.5]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_full_averaging_keeps_all_models_at_the_global_one(optimizer: str) -> None:  # F4
    sites = toy(counts=(60, 60, 60))
    for site in sites:
        site.batch = 60  # the same minibatch for both models
    s = FedSMSimulation(sites, optimizer, steps=3, lr=0.05, lam=1 / 3)
    averaged = Simulation("fedavg", toy(counts=(60, 60, 60)), start=torch.zeros(8, dtype=DOUBLE), steps=3, lr=0.05)
    for site in averaged.problems:
        site.batch = 60
    for _ in range(8):
        s.one()
        averaged.one()
        for model in s.server["personal"]:
            assert float((model - s.server["model"]).abs().max()) < 1e-12
        if optimizer == "sgd":
            assert float((averaged.x - s.server["model"]).abs().max()) < 1e-12


def test_a_selector_of_summed_gradients_is_central_training() -> None:  # F6, with the server's Adam exactly
    sites = toy(counts=(60, 60, 60))
    s = FedSMSimulation(sites, steps=1, lr=0.05, selector_optimizer="server_adam", selector_lr=0.05)
    phi, memory = torch.zeros(24, dtype=DOUBLE), dict[str, Any]()
    for _ in range(20):
        s.one()
        gradient = sum(Selector(site).full_gradient(phi) for site in sites) / 3
        phi = phi - 0.05 * adam(gradient, memory)
        assert float((phi - s.server["selector"]).abs().max()) < 1e-12


def test_averaged_moments_are_close_to_central_adam_but_not_equal() -> None:  # F6
    s = FedSMSimulation(toy(counts=(60, 60, 60)), steps=1, lr=0.05, selector_lr=0.05)
    t = FedSMSimulation(toy(counts=(60, 60, 60)), steps=1, lr=0.05, selector_lr=0.05, selector_optimizer="server_adam")
    s.run(5)
    t.run(5)
    gap = float((s.server["selector"] - t.server["selector"]).norm() / t.server["selector"].norm())
    assert 1e-3 < gap < 0.8


def accuracy(s: Simulation, name: str) -> float:
    """Mean over the sites' test samples of the super model with gamma .9, the global model, or the selector."""
    server, found = s.server, []
    for k, site in enumerate(s.problems):
        x, y = site.held
        p = torch.softmax(x @ server["selector"].view(x.shape[1], -1), dim=1)
        sure, likely = p.max(dim=1)
        if name == "selector":
            found.append(float((likely == k).double().mean()))
            continue
        outputs = torch.stack([x @ w for w in (*server["personal"], server["model"])])
        route = torch.where(sure > 0.9, likely, len(s.problems)) if name == "super" else torch.full_like(likely, k if name == "own" else 3)
        guess = outputs.gather(0, route[None])[0] > 0
        found.append(float((guess.to(DOUBLE) == y).double().mean()))
    return sum(found) / len(found)


@pytest.mark.slow
def test_the_linear_toy(capsys: pytest.CaptureFixture[str]) -> None:  # F7
    table: dict[str, list[float]] = {}
    for seed in range(5):
        for name, options in {"1/3": {"lam": 1 / 3}, ".7": {"lam": 0.7}, ".9": {"lam": 0.9}, "1": {"lam": 1.0},
                              "none": {"lam": 0.7, "selector_optimizer": "none"}}.items():  # fmt: skip
            s = FedSMSimulation(toy(seed), steps=[6, 9, 12], lr=0.05, selector_lr=0.05, select=False, **options)
            s.run(60)
            for what in ("super", "own", "global", "selector"):
                table.setdefault(f"{what} {name}", []).append(accuracy(s, what))
    mean = {name: sum(values) / len(values) for name, values in table.items()}
    with capsys.disabled():
        print({name: round(value, 3) for name, value in mean.items()})
    assert mean["super .7"] > mean["global .7"] + 0.05
    assert mean["own 1/3"] <= mean["own .7"] <= mean["own .9"] <= mean["own 1"]
    assert mean["super 1/3"] <= mean["super .7"] <= mean["super .9"] <= mean["super 1"]
    assert mean["selector .7"] > mean["selector none"] + 0.2
    assert abs(mean["super none"] - mean["global none"]) < 0.05


def test_one_client_is_local_training() -> None:  # F8
    def alone() -> list[Site]:
        sites = toy(counts=(60,))
        sites[0].batch = 60
        return sites

    s = FedSMSimulation(alone(), "sgd", steps=4, lr=0.05, lam=0.3)
    local = Simulation("local", alone(), start=torch.zeros(8, dtype=DOUBLE), steps=4, lr=0.05, local_momentum=0.0)
    s.run(3)
    local.run(3)
    assert torch.allclose(s.x, local.clients[0]["own"], atol=1e-14)
    assert torch.allclose(s.server["personal"][0], local.clients[0]["own"], atol=1e-14)


def test_a_client_without_validation_samples_has_no_vote() -> None:  # F8
    sites = toy()
    sites[1].held = None
    s = FedSMSimulation(sites, steps=2, lr=0.05)
    s.run(3)
    numbers = [reply.numbers for reply in s.replies]
    assert numbers[1]["votes"] == 0 and numbers[0]["votes"] == 2
    best = s.server["best"]
    assert set(best["personal"]) == {"0", "score_0", "2", "score_2"}
    assert 0 < best["score_model"] <= 1
    committee = s.method.committee(s.server)
    assert committee is not None and torch.equal(committee.own[1], s.server["personal"][1])


def test_nobody_votes_in_round_0_and_the_best_is_kept() -> None:
    s = FedSMSimulation(toy(), steps=2, lr=0.05)
    s.one()
    assert not s.replies[0].numbers and s.server["best"] == {}
    before = s.server["model"].clone()
    s.one()
    assert torch.equal(s.server["best"]["model"], before)  # what was scored, not what came of it
    for _ in range(6):
        s.one()
    assert s.server["best"]["score_model"] >= 0.5


def numpy_fedsm(sites: list[Site], rounds: int, steps: list[int], lr: float, lam: float, selector_lr: float, epochs: int) -> dict[str, Any]:
    """FedSM in plain loops over floats: no code of the package takes part."""
    k, d = len(sites), sites[0].inputs.shape[1]
    data = [(s.inputs.numpy(), s.targets.numpy()) for s in sites]
    held = [(s.held[0].numpy(), s.held[1].numpy()) for s in sites]
    share = np.array(steps) / sum(steps)

    def adam_step(w: Any, g: Any, m: dict[str, Any], rate: float) -> Any:
        m["t"] = m.get("t", 0) + 1
        m["a"] = 0.9 * m.get("a", 0) + 0.1 * g
        m["b"] = 0.999 * m.get("b", 0) + 0.001 * g**2
        return w - rate * (m["a"] / (1 - 0.9 ** m["t"])) / (np.sqrt(m["b"] / (1 - 0.999 ** m["t"])) + 1e-8)

    def softmax(z: Any) -> Any:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def slope(w: Any, x: Any, y: Any) -> Any:
        return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(x)

    g, own, phi = np.zeros(d), [np.zeros(d) for _ in sites], np.zeros((d, k))
    kept: list[dict[str, dict[str, Any]]] = [{"g": {}, "w": {}} for _ in sites]
    moments: Any = None
    best: dict[str, Any] = {"g": (-1.0, g), "phi": (-1.0, phi), "own": [(-1.0, None)] * k}
    for r in range(rounds):
        if r > 0:
            right = [[float((((x @ w) > 0) == y).mean()) for w in (g, own[i])] for i, (x, y) in enumerate(held)]
            recall = [float((softmax(x @ phi).argmax(1) == i).mean()) for i, (x, _) in enumerate(held)]
            for name, model, values in (("g", g, [s[0] for s in right]), ("phi", phi, recall)):
                score = float(np.dot(share, values))
                if score > best[name][0]:
                    best[name] = (score, model.copy())
            for i in range(k):
                if right[i][1] > best["own"][i][0]:
                    best["own"][i] = (right[i][1], own[i].copy())
        ends, trained, phis, seconds = [], [], [], []
        for i, (x, y) in enumerate(data):
            a, b = g.copy(), own[i].copy()
            for _ in range(steps[i]):
                a = adam_step(a, slope(a, x, y), kept[i]["g"], lr)
                b = adam_step(b, slope(b, x, y), kept[i]["w"], lr)
            p, memory = phi.copy(), {} if moments is None else {"a": moments[0].copy(), "b": moments[1].copy(), "t": r * epochs}
            for _ in range(epochs):
                wrong = softmax(x @ p)
                wrong[:, i] -= 1
                p = adam_step(p, steps[i] * x.T @ wrong / len(x), memory, selector_lr)
            ends.append(a), trained.append(b), phis.append(p), seconds.append((memory["a"], memory["b"]))
        g = g + sum(w * (e - g) for w, e in zip(share, ends, strict=True))
        phi = phi + sum(w * (p - phi) for w, p in zip(share, phis, strict=True))
        moments = [sum(w * m[j] for w, m in zip(share, seconds, strict=True)) for j in (0, 1)]
        own = [lam * trained[i] + (1 - lam) / (k - 1) * sum(trained[j] for j in range(k) if j != i) for i in range(k)]
    return {"g": g, "own": own, "phi": phi, "moments": moments, "best": best}


def test_five_rounds_against_a_reference_in_numpy() -> None:
    """Weights by steps, averaged moments, SoftPull without weights, kept local Adam, the best of the rounds; full batches, 1e-10."""
    sites = toy(seed=4, counts=(23, 31, 47), tests=37)
    for site in sites:
        site.batch = len(site.inputs)
    steps = [2, 3, 5]
    s = FedSMSimulation(sites, steps=steps, lr=0.07, lam=0.62, selector_lr=0.11, selector_epochs=3)
    s.run(5)
    wanted = numpy_fedsm(sites, 5, steps, 0.07, 0.62, 0.11, 3)

    def near(found: Tensor, value: Any) -> bool:
        return bool(np.abs(found.numpy() - np.asarray(value).reshape(-1)).max() < 1e-10)

    assert near(s.server["model"], wanted["g"]) and near(s.server["selector"], wanted["phi"])
    assert all(near(a, b) for a, b in zip(s.server["personal"], wanted["own"], strict=True))
    assert near(s.server["moments"], np.concatenate([m.reshape(-1) for m in wanted["moments"]]))
    best, chosen = wanted["best"], s.method.committee(s.server)
    assert chosen is not None and chosen.shared is not None and chosen.selector is not None
    assert near(chosen.shared, best["g"][1]) and near(chosen.selector, best["phi"][1])
    assert all(near(a, b[1]) for a, b in zip(chosen.own, best["own"], strict=True))


def test_moments_are_as_old_as_the_rounds_wherever_a_client_was() -> None:
    """Adam's bias correction belongs to the averaged moments: a client that was away takes the step that the others take."""
    sites = toy(counts=(20, 20, 20))
    s = FedSMSimulation(sites, steps=1, lr=0.05, selector_lr=0.05, select=False, selector_epochs=2)
    s.one()
    s.one(chosen=(1, 2))
    s.one(chosen=(1, 2))
    plan = s.method.plan(s.server, Round(3, 0.05, (0, 1, 2), (1, 1, 1), (1 / 3,) * 3), 0)
    moved, phi = s.method.step(s.clients[0], plan.copy(), sites[0]).tensors["selector"], plan.tensors["selector"].clone()
    first, second = plan.tensors["moments"].chunk(2)
    memory, y = {"first": first.clone(), "second": second.clone(), "count": 6}, phi.clone()
    for _ in range(2):
        y = y - 0.05 * adam(Selector(sites[0]).full_gradient(y), memory)
    assert torch.allclose(moved, y - phi, atol=1e-14)


def test_what_crosses_the_wire() -> None:
    s = FedSMSimulation(toy(), steps=2, lr=0.05)
    s.one()
    assert set(s.replies[0].tensors) == {"model", "personal", "selector", "moments"}
    assert s.sent == {"down": 3 * (8 + 8 + 24), "up": 3 * (8 + 8 + 24 + 48)}
    s.one()
    assert s.sent["down"] == 3 * (8 + 8 + 24) * 2 + 3 * 48
    t = FedSMSimulation(toy(), steps=2, lr=0.05, selector_optimizer="server_adam")
    t.one()
    assert t.sent == {"down": 3 * 40, "up": 3 * 40}


def test_extra_learns_one_after_the_other() -> None:
    s = FedSMSimulation(toy(), steps=2, lr=0.05, rounds=6, mode="extra", selector_rounds=2, finetune_epochs=3)
    averaged = Simulation("fedavg", toy(), start=torch.zeros(8, dtype=DOUBLE), steps=2, lr=0.05)
    s.method.federation = Federation(3, (1 / 3,) * 3, networks=s.method.federation.networks, rounds=6)
    s.run(3)
    averaged.run(3)
    assert torch.allclose(s.x, averaged.x, atol=1e-14) and not s.server["selector"].any()
    s.one()
    assert not torch.equal(s.server["personal"][0], s.server["personal"][1]) and torch.allclose(s.x, averaged.x, atol=1e-14)
    own = [m.clone() for m in s.server["personal"]]
    s.run(2)
    assert s.server["selector"].any() and all(torch.equal(a, b) for a, b in zip(own, s.server["personal"], strict=True))


# Inference: gamma, oracle, empty truths


def committee(gamma: float = 0.9) -> Committee:
    return Committee(torch.zeros(1), (torch.zeros(1),) * 3, "super", torch.zeros(1), gamma)


def test_gamma() -> None:  # F2
    generator = torch.Generator().manual_seed(0)
    found = torch.softmax(4 * torch.randn(200, 3, generator=generator), dim=1)
    found[0] = torch.tensor([0.0, 1.0, 0.0])
    owner = torch.zeros(200, dtype=torch.int64)
    assert (choose(committee(1.0), owner, found).route == SHARED).all()  # a softmax of exactly 1 is not above 1
    assert torch.equal(choose(committee(0.0), owner, found).route, found.argmax(1))
    shares = [float((choose(committee(g), owner, found).route == SHARED).double().mean()) for g in (0, 0.3, 0.5, 0.7, 0.9, 0.99, 1)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    edge = float(found[5].max())
    assert int(choose(committee(edge), owner, found).route[5]) == SHARED  # strict
    near = choose(committee(math.nextafter(edge, 0)), owner, found.double()).route[5]
    assert int(near) == int(found[5].argmax())
    tie = torch.tensor([[0.4, 0.4, 0.2]])
    assert int(choose(committee(0.0), owner[:1], tie).route) == 0  # the lowest client


def test_a_gamma_of_each_client() -> None:
    """The threshold is that of the most probable client, and still strict."""
    found = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]], dtype=DOUBLE)
    chosen = choose(committee((0.6, 0.7, 0.0)), torch.zeros(4, dtype=torch.int64), found)  # type: ignore[arg-type]
    assert chosen.route.tolist() == [0, SHARED, 2, SHARED]


def test_an_oracle_is_the_personalised_models_and_super_lies_between() -> None:  # F11
    generator = torch.Generator().manual_seed(3)
    said = {
        m: Answer(torch.zeros(60), torch.rand(60, 1, generator=generator, dtype=DOUBLE), torch.zeros(60, 1, 3)) for m in (SHARED, 0, 1, 2)
    }
    owner = torch.arange(60) % 3
    sure = torch.nn.functional.one_hot(owner, 3).double()
    oracle = spoken(said, choose(committee(), owner, sure, "oracle"))
    right = spoken(said, choose(committee(), owner, sure))
    assert torch.equal(oracle.dice, right.dice)
    half = sure.clone()
    half[::2] = 1 / 3
    mixed = spoken(said, choose(committee(), owner, half)).dice[:, 0]
    low = torch.minimum(oracle.dice[:, 0], said[SHARED].dice[:, 0])
    high = torch.maximum(oracle.dice[:, 0], said[SHARED].dice[:, 0])
    assert bool(((mixed >= low) & (mixed <= high)).all())


def test_empty_truths_are_left_out() -> None:  # F9
    dice = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [0.5, 0.0]], dtype=DOUBLE)
    assert mean_of(dice) == pytest.approx((1.0 + 0.25) / 2)
    assert math.isnan(mean_of(dice[1:2]))


# The personalised baselines at their limits


def test_ditto_between_local_and_global() -> None:
    problems = quadratics(4)
    local = Simulation("local", problems, local_momentum=0.0)
    ditto = Simulation("ditto", problems, strength=0.0)
    local.run(5)
    ditto.run(5)
    for a, b in zip(local.clients, ditto.clients, strict=True):
        assert torch.allclose(a["own"], b["own"], atol=1e-13)
    average = Simulation("fedavg", problems)
    average.run(5)
    assert torch.allclose(ditto.x, average.x, atol=1e-14)
    near = Simulation("ditto", problems, strength=15.0, personal_epochs=3)
    near.run(300)
    free = Simulation("ditto", problems, strength=0.1, personal_epochs=3)
    free.run(300)
    for a, b, p in zip(near.clients, free.clients, problems, strict=True):
        assert float((a["own"] - near.x).norm()) < float((b["own"] - free.x).norm()) + 1e-9
        fixed = torch.linalg.solve(p.curvature + 15.0 * torch.eye(6, dtype=DOUBLE), p.curvature @ p.centre + 15.0 * near.x)
        assert float((a["own"] - fixed).abs().max()) < 1e-6


def test_apfl_limits() -> None:
    problems = quadratics(4)
    average, local = Simulation("fedavg", problems), Simulation("local", problems, local_momentum=0.0)
    zero, one = Simulation("apfl", problems, mix=0.0), Simulation("apfl", problems, mix=1.0)
    for s in (average, local, zero, one):
        s.run(4)
    assert torch.allclose(zero.x, average.x, atol=1e-13) and torch.allclose(one.x, average.x, atol=1e-13)
    for mixed, alone in zip(one.clients, local.clients, strict=True):
        assert torch.allclose(one.method.served(one.server, mixed), alone["own"], atol=1e-13)
    learnt = Simulation("apfl", problems, adaptive=True)
    learnt.run(10)
    assert all(0 <= c["mix"] <= 1 for c in learnt.clients) and any(c["mix"] != 0.5 for c in learnt.clients)


def test_fedper_and_fedrep_send_the_body_only() -> None:
    for name in ("fedper", "fedrep"):
        s = Simulation(name, quadratics(4))
        s.run(3)
        assert s.sent == {"down": 3 * 4 * 5, "up": 3 * 4 * 5}  # of 6 numbers the last one stays
        heads = [c["own"][-1].item() for c in s.clients]
        assert len(set(heads)) == 4
        assert s.server["model"][-1] == 1.0  # the initial head never moves
        body = s.server["model"][:-1]
        assert all(torch.equal(s.method.served(s.server, c)[:-1], body) for c in s.clients)


def test_fedrep_trains_head_then_body() -> None:
    problem = quadratics(1)[0]
    s = Simulation("fedrep", [problem], steps=2, lr=0.1)
    y, head = s.x.clone(), torch.zeros(6, dtype=DOUBLE)
    head[-1] = 1
    for keep in (head, 1 - head):
        for _ in range(2):
            y = y - 0.1 * keep * problem.gradient(y, 0)
    s.one()
    assert torch.allclose(s.method.served(s.server, s.clients[0]), y, atol=1e-14)


def test_l2gd_is_softpulls_random_sibling() -> None:
    problems = [Linear(torch.full((6,), float(k), dtype=DOUBLE)) for k in range(4)]
    s = Simulation("l2gd", problems, steps=4, lr=0.05, strength=2.0)
    means = []
    for _ in range(30):
        s.one()
        means.append(s.method.served(s.server, s.clients[0]))
    c = 0.05 * 0.8 * 2.0 / 0.2
    assert s.server["pull"] == pytest.approx(c)
    served = torch.stack([s.method.served(s.server, state) for state in s.clients])
    own = torch.stack([state["own"] for state in s.clients])
    assert torch.allclose(served.mean(0), own.mean(0), atol=1e-12)  # a pull keeps the mean
    assert torch.allclose(served - served.mean(0), (1 - c) * (own - own.mean(0)), atol=1e-12)
    drawn = [s.method.configure(s.server, Round(r, 0.05, (0, 1, 2, 3), (4,) * 4, (0.25,) * 4)).steps[0] for r in range(4000)]
    assert min(drawn) == 0 and sum(drawn) / len(drawn) == pytest.approx(4, rel=0.08)  # mean (1 - q)/q
    with pytest.raises(RecipeError, match="at most 5"):
        Simulation("l2gd", problems, steps=4, lr=0.05, strength=6.0).one()


def test_l2gd_pulls_by_the_rate_of_the_round_that_the_pull_ends() -> None:
    problems = [Quadratic(torch.eye(6, dtype=DOUBLE), torch.full((6,), float(k), dtype=DOUBLE)) for k in range(3)]
    s = Simulation("l2gd", problems, steps=4, lr=lambda r: 0.05 / (r + 1), strength=2.0)
    for _ in range(6):
        s.one()
        served = [s.method.served(s.server, state) for state in s.clients]
        quiet = [Linear(torch.zeros(6, dtype=DOUBLE))] * 3
        s.problems, held = quiet, s.problems
        s.one()  # no gradient: a client ends where it began, after the pull
        s.problems = held
        for state, before in zip(s.clients, served, strict=True):
            assert torch.allclose(state["own"], before, atol=1e-15)


def test_l2gd_pulls_to_the_unweighted_mean() -> None:
    """Its objective counts every client once, whatever the clients' sizes are."""
    problems = [Linear(torch.full((6,), float(k), dtype=DOUBLE)) for k in range(3)]
    s = Simulation("l2gd", problems, steps=4, lr=0.05, strength=2.0, weights=[0.1, 0.2, 0.7])
    for _ in range(5):
        s.one()
    assert torch.allclose(s.x, torch.stack([state["own"] for state in s.clients]).mean(0), atol=1e-14)


def test_frequencies_are_exchanged_and_phases_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 4, 3, 3, generator=generator, dtype=DOUBLE) for _ in range(3)]
    assert torch.equal(as_weight(as_matrix(weights[0]), (6, 4, 3, 3)), weights[0]) and as_matrix(weights[0]).shape == (12, 18)
    for a, b in zip(weights, exchange_frequencies(weights, 0.0), strict=True):
        assert torch.allclose(a, b, atol=1e-12)  # nothing exchanged
    full = exchange_frequencies(weights, 1.0)
    amplitudes = [torch.fft.fft2(as_matrix(w)).abs() for w in weights]
    mean = torch.stack(amplitudes).mean(0)
    assert torch.allclose(torch.fft.fft2(as_matrix(full[0])).abs(), mean, atol=1e-9)
    assert torch.allclose(torch.fft.fft2(as_matrix(full[1])).angle().cos(), torch.fft.fft2(as_matrix(weights[1])).angle().cos(), atol=1e-6)
    same = exchange_frequencies([weights[0]] * 3, 0.8)
    assert torch.allclose(same[2], weights[0], atol=1e-12)
    assert window(10, 0.7) == slice(2, 8) and window(7, 1.0) == slice(0, 6)


def test_local_adam_is_torchs() -> None:
    problem = quadratics(1)[0]
    y = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=DOUBLE))
    reference = torch.optim.Adam([y], lr=0.05)
    ours, memory = y.detach().clone(), dict[str, Any]()
    for _ in range(25):
        y.grad = problem.gradient(y.data, 0)
        reference.step()
        ours = ours - 0.05 * adam(problem.gradient(ours, 0), memory)
    assert float((ours - y.data).abs().max()) < 1e-13


def test_moments_live_on_unless_reset() -> None:
    found = {}
    for reset in (False, True):
        s = Simulation("fedavg", quadratics(2), steps=3)
        s.method.federation = Federation(2, (0.5, 0.5), optimizer="adam", reset_optimizer=reset)
        s.run(2)
        found[reset] = (s.x, s.clients[0].get("adam_model"))
    assert found[False][1]["count"] == 6 and found[True][1] is None
    assert not torch.equal(found[False][0], found[True][0])


def test_a_plan_of_a_later_round_carries_the_moments() -> None:
    s = FedSMSimulation(toy(), steps=1, lr=0.05)
    setting = Round(1, 0.05, (0, 1, 2), (1, 1, 1), (1 / 3,) * 3)
    s.one()
    plan: Plan = s.method.plan(s.server, setting, 0)
    assert plan.tensors["moments"].numel() == 48 and "selector" not in s.clients[0]
