"""Searches as whole runs: equal for any number of processes, resumed without a trace, counted as forecast, survived, refused by name."""

from __future__ import annotations

import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_federate_runs import equal, train
from test_federate_runs import recipe as plain

from xutrain.engine.context import Context
from xutrain.errors import Diverged, RecipeError, Stopped
from xutrain.loops import federated
from xutrain.recipe.search import WHOLE_RUN, searchable
from xutrain.registry import entries, load

LR, WORK, SLR = "{low: 0.01, high: 0.4}", "{low: 2, high: 5}", "{low: 0.5, high: 1.5}"
SPACE = f"{{lr: {LR}, local_work: {WORK}, weights: {{}}, server_lr: {SLR}}}"
OWN = "{lr: {low: 0.01, high: 0.4, per_client: true}, local_work: {low: 1, high: 2, unit: epochs, per_client: true}}"
HELD = {"clients.val_fraction": 0.2, "train.rounds": 4}


def changes(agent: str = "gaussian", space: str = SPACE, **more: Any) -> dict[str, Any]:
    return {**HELD, "search": f"{{agent: {agent}, space: {space}}}", **more}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lag0": ("fedavg", changes()),
    "lag1": ("fedavg", changes(**{"search.lag": 1})),
    "mlp": ("fedavg", changes("{name: mlp, hidden: 16}")),
    "chol": ("fedavg", changes("{name: gaussian, cov: chol}", **{"search.antithetic": "true"})),
    "discrete": ("fedavg", changes("discrete", f"{{lr: {LR}, server_lr: {SLR}}}")),
    "factorised": ("fedadam", changes("discrete_factorised", **{"search.credit": "client"})),
    "dirichlet": ("fedavg", changes(space=f"{{lr: {LR}, weights: {{form: dirichlet}}}}")),
    "random": ("domo", changes("{name: random, trials: 2}")),
    "frozen": ("fedprox", changes("frozen")),
    "fixed": ("fedavg", changes("fixed")),
    "own": ("fedavg", changes(space=OWN, **{"clients.steps": "own", "search.credit": "client"})),
    "domo": ("domo", changes(space=f"{{lr: {LR}, beta: {{low: 0.1, high: 1.0}}, server_lr: {SLR}}}")),
    "mime": ("mime", changes(space=f"{{lr: {LR}, weights: {{}}}}")),
    "partial": ("scaffold", changes(space=f"{{lr: {LR}, weights: {{form: simplex}}}}", **{"clients.fraction": 0.5})),
    "rollouts": ("fedavg", changes(**{"search.rollouts": 3, "search.rollout_apply": "best", "data.val_fraction": 0.1})),
    "dropout": ("fedavg", changes(**{"clients.dropout": 0.4})),
    "codec": ("fedavg", changes(**{"codec": "{name: orq}"})),
    "statistics": ("fedavg", changes(**{"model": "{name: resnet_cifar, depth: 8, width: 4}", "train.rounds": 2, "data.subset": 120})),
}  # fmt: skip


def _processes(folder: str, names: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in names:
        run = train(f"{folder}/{name}", *CASES[name])
        found.append({k: run[k] for k in ("model", "metrics", "meter")})
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_bits(tmp_path: Path, processes: int, forked: Any) -> None:
    names = ["lag0", "lag1", "rollouts", "domo"]
    alone = _processes(str(tmp_path / "1"), names)
    for other in forked(_processes, processes, str(tmp_path / f"{processes}"), names):
        assert equal(alone, other)


@pytest.mark.parametrize("name", CASES)
def test_stop_and_resume_leave_no_trace(tmp_path: Path, name: str) -> None:  # 11
    """Stopped at every round: model, policy, memory, moments and record as if it had not been."""
    method, more = CASES[name]
    whole = train(str(tmp_path / "whole"), method, more)
    (tmp_path / "parts").mkdir()
    for at in range(1, plain(method, **more).train.rounds):
        (tmp_path / "parts" / "STOP").write_text(str(at))
        with pytest.raises(Stopped):
            train(str(tmp_path / "parts"), method, more)
    (tmp_path / "parts" / "STOP").unlink()
    resumed = train(str(tmp_path / "parts"), method, more)
    assert equal(whole["saved"].shared, resumed["saved"].shared)
    assert equal(whole["metrics"], resumed["metrics"])

    def curve(run: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(x["step"], x["name"], x["value"], x["bits_up"], x["bits_down"]) for x in run["lines"]]

    assert curve(whole) == curve(resumed)


@pytest.mark.parametrize("name", CASES)
def test_forecast_equals_the_meter(tmp_path: Path, name: str) -> None:
    method, more = CASES[name]
    predicted = federated.forecast(plain(method, **more))
    run = train(str(tmp_path), method, more)
    parts = {part: {"up": up, "down": down} for part, (up, down) in run["meter"].items()}
    assert predicted.details["parts"] == parts
    assert (predicted.up, predicted.down) == (sum(p["up"] for p in parts.values()), sum(p["down"] for p in parts.values()))


@pytest.mark.parametrize("lag", [0, 1])
def test_one_model_down_and_one_update_up(tmp_path: Path, lag: int) -> None:
    """32 P + 64 bits down and 32 P + 32 up per client and round, whatever the lag; aggregation weights and server lr stay."""
    run = train(str(tmp_path), "fedavg", changes(**{"search.lag": lag}))
    visits, size = 4 * 4, run["model"].numel()
    assert run["meter"] == {
        "model": [0, visits * 32 * size],
        "update": [visits * 32 * size, 0],
        "lr": [0, visits * 32],
        "local_work": [0, visits * 32],
        "val_loss": [visits * 32, 0],
    }


@pytest.mark.parametrize(("method", "options"), [("fedavg", {}), ("fedadam", {"method.server_lr": 0.05})])
@pytest.mark.parametrize("agent", ["fixed", "{name: gaussian, lr: 0.0, init_std: 0.0}"])
def test_6_a_policy_that_stands_still_is_the_method_itself(tmp_path: Path, method: str, options: dict[str, Any], agent: str) -> None:
    server = "server_lr: {low: 0.5, high: 1.5}" if method == "fedavg" else "server_lr: {low: 0.025, high: 0.075}"
    space = f"{{lr: {LR}, local_work: {WORK}, weights: {{}}, {server}}}"
    searched = train(str(tmp_path / "a"), method, {**options, **changes(agent, space)})
    lr, steps = (0.01 + 0.4) / 2, int(3.5 + 0.5)
    still = {**HELD, **options, "train.lr": lr, "train.local_steps": steps}
    if method == "fedadam":
        still["method.server_lr"] = (0.025 + 0.075) / 2
    unsearched = train(str(tmp_path / "b"), method, still)
    assert torch.equal(searched["model"], unsearched["model"])
    assert searched["metrics"] == unsearched["metrics"]


def test_7_one_client_is_local_sgd_whatever_the_weights(tmp_path: Path) -> None:
    one = {"clients.count": 1, "train.rounds": 3}
    a = train(str(tmp_path / "a"), "fedavg", changes("{name: frozen, init_std: 0.4}", "{weights: {}}", **one))
    b = train(str(tmp_path / "b"), "fedavg", {**HELD, **one})
    assert torch.equal(a["model"], b["model"])


def test_3_nothing_moves_before_two_rewards(tmp_path: Path) -> None:
    run = train(str(tmp_path), "fedavg", changes(**{"train.rounds": 5}))
    means = [x["value"] for x in run["lines"] if x["name"] == "policy_mean_lr"]
    assert means[0] == means[1] == (0.01 + 0.4) / 2 and means[2] != means[1]
    assert len([x for x in run["lines"] if x["name"] == "reward"]) == 4


def test_2_the_scale_of_the_loss_does_not_matter_to_the_reward(tmp_path: Path) -> None:
    run = train(str(tmp_path), "fedavg", changes(**{"train.rounds": 5}))
    losses = [x["value"] for x in run["lines"] if x["name"] == "search_loss"]
    rewards = [x["value"] for x in run["lines"] if x["name"] == "reward"]
    assert rewards == pytest.approx([1 - b / a for a, b in pairwise(losses)], abs=1e-12)


def test_the_record_shows_the_draw_and_the_policy_and_a_picture(tmp_path: Path) -> None:
    run = train(str(tmp_path), "fedavg", changes())
    last = {x["name"]: x["value"] for x in run["lines"] if x["step"] == 4 and x["split"] == "search"}
    for name in ("lr", "local_work", "server_lr", *(f"weight_{k}" for k in range(4))):
        assert {f"sample_{name}", f"policy_mean_{name}", f"policy_std_{name}"} <= set(last)
    assert last["policy_std_lr"] == pytest.approx(0.39 * 0.108) and sum(last[f"sample_weight_{k}"] for k in range(4)) == pytest.approx(1)
    assert (tmp_path / "artefacts" / "search.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_survived_and_recorded(tmp_path: Path, lag: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 answers nonsense once in round 3: reward -1, the model before comes back, the next round draws again, all is recorded."""
    from xutrain.loops.clients import ClientData

    evaluate, gradient, said = ClientData.evaluate, ClientData.gradient, {"loss": 0, "gradient": 0}

    def bad_loss(self: ClientData, point: torch.Tensor, split: str = "val") -> dict[str, float]:
        said["loss"] += self.client == 2
        return {"loss": float("inf")} if what == "loss" and self.client == 2 and said["loss"] == 4 else evaluate(self, point, split)

    def bad_gradient(self: ClientData, point: torch.Tensor, step: int) -> torch.Tensor:
        found = gradient(self, point, step)
        said["gradient"] += self.client == 2 and step == 0
        return found * float("nan") if what == "gradient" and self.client == 2 and said["gradient"] == 4 else found

    monkeypatch.setattr(ClientData, "evaluate", bad_loss)
    monkeypatch.setattr(ClientData, "gradient", bad_gradient)
    run = train(str(tmp_path), "fedavg", changes(**{"train.rounds": 8, "search.lag": lag}))
    assert torch.isfinite(run["model"]).all()
    lines = {name: [x["value"] for x in run["lines"] if x["name"] == name] for name in ("lost_rounds", "reward", "search_loss")}
    assert lines["lost_rounds"][-1] == 1 and lines["reward"].count(-1.0) == 1
    # the model before came back: its loss is answered a second time (or, where the loss was the nonsense, stands)
    assert any(a == b for a, b in pairwise(lines["search_loss"]))
    notes = json.loads((tmp_path / "run.json").read_text())["notes"]
    assert any("not finite" in note and "round 4" in note for note in notes)
    again = what == "loss" and lag == 0
    size = run["model"].numel()
    assert run["meter"]["model"][1] == (8 + again) * 4 * 32 * size, "only a restored model under lag 0 is sent once more"


def test_a_range_that_only_breaks_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="rounds in a row"):
        train(str(tmp_path), "fedavg", changes(space="{lr: {low: 1.0e+20, high: 1.0e+22}}", **{"train.rounds": 14}))


def test_a_training_of_a_random_search_that_breaks_only_loses(tmp_path: Path) -> None:
    agent, space = "{name: random, trials: 2}", "{lr: {low: 0.05, high: 1.0e+30, scale: log}}"
    run = train(str(tmp_path / "a"), "fedavg", changes(agent, space, **{"train.rounds": 26, "seed": 1}))
    held = run["saved"].shared["server"]["search"]
    assert 10 < held["lost"] < 26 and torch.isfinite(run["model"]).all()
    with pytest.raises(Diverged, match="no round of any training"):
        never = changes(agent, "{lr: {low: 1.0e+28, high: 1.0e+30}}", **{"train.rounds": 26})
        train(str(tmp_path / "b"), "fedavg", never)


def test_a_fixed_point_that_breaks_has_diverged(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train(str(tmp_path), "fedavg", changes("fixed", "{lr: {low: 1.0e+20, high: 1.0e+22}}", **{"train.rounds": 4}))


def test_a_random_search_serves_its_best_trial(tmp_path: Path) -> None:
    """Two trainings of two rounds; each starts from the initial model."""
    run = train(str(tmp_path), "fedavg", changes("{name: random, trials: 2}"))
    losses = [x["value"] for x in run["lines"] if x["name"] == "search_loss"]
    assert losses[2] == losses[0], "the second training starts from the same model"
    held = run["saved"].shared["server"]
    assert held["search"]["best_loss"] == min(losses[1], losses[3])
    assert torch.equal(run["model"], held["search"]["best"]["model"])


@pytest.mark.parametrize(
    ("more", "where", "word"),
    [
        (changes(space="{lr: {low: 0.1, high: 0.1}}"), "search.space.lr.low", "empty"),
        (changes(space="{lr: {low: 0.2, high: 0.1}}"), "search.space.lr.low", "reversed"),
        (changes(space="{lr: {low: 0.0, high: 0.1, scale: log}}"), "search.space.lr.low", "greater than 0"),
        (changes(space="{lr: {low: 0.1}}"), "search.space.lr.high", "missing"),
        (changes(space="{}"), "search.space", "nothing to search"),
        (changes(space="{beta: {low: 0, high: 1}}"), "search.space.beta", "no such option"),
        (changes(space="{servr_lr: {low: 0, high: 1}}"), "search.space.servr_lr", "did you mean server_lr"),
        (changes(space="{nesterov: {low: 0, high: 1}}"), "search.space.nesterov", "is no number"),
        (changes(space="{lr: {low: 0.1, high: 0.4, scale: log, values: [0.0, 0.2]}}"), "search.space.lr.values", "greater than 0"),
        (changes(space="{lr: {low: 0.1, high: 0.4, floor: 0.3, ceiling: 0.2}}"), "search.space.lr.floor", "above the ceiling"),
        (changes(space="{lr: {low: -1.0e+308, high: 1.0e+308}}"), "search.space.lr.high", "wider than any number"),
        (changes(space="{lr: {low: 1.0e-6, high: 1.0e-5}}"), "search.space.lr.high", "least legal value, 0.0001"),
        (changes(space="{local_work: {low: 0.1, high: 0.4}}"), "search.space.local_work.high", "least legal value, 1"),
        (changes(space="{local_work: {low: 1.0e+9, high: 1.0e+12}}"), "search.space.local_work.low", "greatest legal value"),
        (changes(space="{local_momentum: {low: 2, high: 3}}"), "search.space.local_momentum.low", "greatest legal value"),
        (changes("mlp", "{weights: {form: dirichlet}}"), "search.agent.name", "law of their own"),
        (changes("discrete", "{weights: {form: dirichlet}}"), "search.agent.name", "law of their own"),
        (changes("discrete_factorised", "{weights: {form: dirichlet}}"), "search.agent.name", "law of their own"),
        (changes("gausian"), "search.agent.name", "gaussian"),
        (changes("{name: gaussian, init_sdt: 1}"), "search.agent.init_sdt", "init_std"),
        (changes(**{"search.windw": 3}), "search.windw", "window"),
        (changes("discrete", **{"clients.count": 8}), "search.agent.name", "10^8"),
        (changes(**{"clients.val_fraction": 0}), "clients.val_fraction", "no samples"),
        (changes(**{"clients.val_fraction": 0.001}), "clients.val_fraction", "0 validation"),
        (changes("mlp", **{"search.credit": "client"}), "search.credit", "joint law"),
        (changes(**{"search.rollouts": 4}), "search.rollouts", "data.val_fraction"),
        (changes(**{"schedule": "{name: cosine}"}), "schedule.name", "no schedule"),
        (changes("{name: random, trials: 9}"), "search.agent.trials", "rounds"),
    ],
)
def test_bad_input_is_named_before_the_first_round(tmp_path: Path, more: dict[str, Any], where: str, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        train(str(tmp_path), "fedavg", more)
    assert caught.value.exit_code == 2
    assert where in [issue.where for issue in caught.value.issues]
    assert word in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_method_without_rounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no rounds that an agent"):
        train(str(tmp_path), "central", changes(space="{lr: {low: 0.01, high: 0.4}}"))


@pytest.mark.parametrize(
    "e", [e for e in entries("method", "federate") if e.module.startswith("xutrain.methods.federate")], ids=lambda e: e.name
)
def test_what_may_be_searched_is_read_every_round(e: Any) -> None:
    """A method asks ``value`` for every option that an agent may draw; one that it reads elsewhere cannot be searched."""
    cls = load("method", e.name, verb="federate")
    source = "".join(inspect.getsource(c) for c in cls.__mro__ if c.__module__.startswith("xutrain"))
    read = set(re.findall(r"value\(\w+, \"(\w+)\"", source))
    known = set(searchable(cls.Options))
    assert known <= read, "add it to WHOLE_RUN of recipe/search.py, or let the method ask value()"
    assert not WHOLE_RUN.get(e.name, frozenset()) & read
    with pytest.raises(RecipeError, match="holds for a whole run"):
        plain("fedrep", **changes(space="{head_epochs: {low: 1, high: 3}}"))


def test_searched_options_change_the_round(tmp_path: Path) -> None:
    """The number of fine-tuning epochs and the rate of learnt weights are drawn as any other."""
    for method, key in (("fedavg_finetune", "finetune_epochs"), ("auto_fedavg", "weight_lr")):
        models = []
        for i, low in enumerate((1, 7)):
            space = f"{{{key}: {{low: {low}, high: {low + 1}}}}}"
            run = train(str(tmp_path / f"{method}{i}"), method, changes("fixed", space, **{"train.rounds": 3}))
            models.append(run["saved"].worker(0)["state"]["own"] if method == "fedavg_finetune" else run["model"])
        assert not torch.equal(*models)


def test_a_grid_that_is_too_large_says_the_arithmetic() -> None:
    """The grids of the public code with the aggregation weights of eight clients: 10 x 9 x 10^8 x 9."""
    server = "server_lr: {low: 0.5, high: 1.5, points: 9}"
    space = f"{{lr: {{low: 5.0e-4, high: 5.0e-2}}, local_work: {{low: 2, high: 40, points: 9}}, weights: {{}}, {server}}}"
    with pytest.raises(RecipeError, match=r"10 x 9 x 10\^8 x 9 = 8.1e\+10 cells, 3.56 TB"):
        plain("fedavg", **changes("discrete", space, **{"clients.count": 8}))


def test_released_takes_over_what_the_public_code_does() -> None:
    value = plain("fedavg", **changes(**{"search.preset": "released"})).search
    assert (value.lag, value.released_bug, value.reward_clip, value.validation) == (1, True, None, "equal")
    assert value.agent.init_std == pytest.approx(0.329, abs=5e-4) and value.space.server_lr.floor == 0.1
    own = plain("fedavg", **changes("{name: gaussian, init_std: 0.2}", **{"search.preset": "released", "search.lag": 0})).search
    assert own.agent.init_std == 0.2 and own.lag == 0
    network = plain("fedavg", **changes("mlp", **{"search.preset": "released"})).search.agent
    assert (network.lr, network.zero_init_head, network.clamp) == (0.01, False, 1.0)


def test_auto_fedavg_learns_its_weights_and_is_fedavg_at_rate_zero(tmp_path: Path) -> None:
    held = {**HELD, "partition.name": "dirichlet", "partition.alpha": 0.5}
    plainly = train(str(tmp_path / "a"), "fedavg", held)
    still = train(str(tmp_path / "b"), "auto_fedavg", {**held, "method.weight_lr": 0.0})
    assert torch.allclose(plainly["model"], still["model"], atol=1e-6)
    learnt = train(str(tmp_path / "c"), "auto_fedavg", {**held, "method.weight_lr": 2.0})
    weights = [x["value"] for x in learnt["lines"] if x["name"].startswith("weight_") and x["step"] == 4]
    assert sum(weights) == pytest.approx(1) and max(weights) - min(weights) > 1e-3


def test_auto_fedavg_steps_along_the_gradient_of_the_weights() -> None:
    """Against autograd through softmax and the mean of the models, on a quadratic loss."""
    from xutrain.methods.federate.auto_fedavg import AutoFedAvg
    from xutrain.methods.federate.base import Federation

    method = AutoFedAvg(AutoFedAvg.Options(weight_lr=1.0), Federation(3, (1 / 3,) * 3))
    model, wanted = torch.zeros(4, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    deltas = {str(k): torch.randn(4, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3)}
    server = {**method.server_state(model), "deltas": deltas}
    logits = server["logits"].clone().requires_grad_()
    mixed = sum(a * d for a, d in zip(torch.softmax(logits, 0), deltas.values(), strict=True))
    (slope,) = torch.autograd.grad(0.5 * (mixed - wanted).square().sum(), logits)  # type: ignore[union-attr]
    before = server["logits"].clone()
    method.learn(server, (mixed - wanted).detach(), 1.0)  # type: ignore[union-attr]
    assert torch.allclose(server["logits"], before - slope, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_auto_fedavg_knows_its_server_rate(alpha: float) -> None:
    """Two rounds on quadratics: the step of round 2 is autograd's through w = x + alpha sum_j a_j (w^j - x)."""
    from xutrain.methods.federate.simulation import Simulation, quadratics

    problems = quadratics(4)
    s, plainly = (Simulation("auto_fedavg", problems, server_lr=a, weight_lr=0.3) for a in (alpha, 1.0))
    start = s.x.clone()
    s.one()
    plainly.one()
    moved = torch.stack(list(plainly.server["deltas"].values()))  # w^j - x, the same in both
    logits = s.server["logits"].clone().requires_grad_()
    point = start + alpha * torch.softmax(logits, 0) @ moved
    assert torch.allclose(s.x, point.detach(), atol=1e-14)
    losses = [0.5 * (point - p.centre) @ p.curvature @ (point - p.centre) / 4 for p in problems]
    (slope,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
    s.one()
    assert torch.allclose(s.server["logits"], logits.detach() - 0.3 * slope, atol=1e-12) and float(slope.abs().max()) > 1e-3


def test_the_entropy_term() -> None:
    from xutrain.loops.clients import entropy_gap

    uniform, sure = torch.zeros(5, 10), torch.eye(10)[:5] * 50
    assert float(entropy_gap(uniform, 2.0)) == 0.0 and float(entropy_gap(sure, 2.0)) == pytest.approx(2.0, abs=1e-6)
    p = torch.tensor([0.395, *[0.605 / 9] * 9]).log()
    assert float(entropy_gap(p[None], 2.0)) == pytest.approx(0.0, abs=5e-3), "the threshold 2 is a top probability of about 0.395"


def test_nesterov_at_a_client_is_torchs(tmp_path: Path) -> None:
    """One client, one round: FedAvg with Nesterov momentum is torch.optim.SGD on the same batches."""
    from xutrain.loops.clients import ClientData

    options = {"clients.count": 1, "train.rounds": 1, "train.local_steps": 4, "method.local_momentum": 0.9, "method.nesterov": "true"}
    run = train(str(tmp_path), "fedavg", options)
    job = federated.build(plain("fedavg", **options), Context())
    weight = job.server["model"].clone().requires_grad_()
    theirs = torch.optim.SGD([weight], lr=0.05, momentum=0.9, nesterov=True)
    data = ClientData(job.bench, 0, job.parts[0], 0)
    for step in range(4):
        weight.grad = data.gradient(weight.detach().clone(), step)
        theirs.step()
    assert torch.allclose(run["model"], weight.detach(), atol=1e-6)


def test_kept_momentum_goes_on_where_it_was(tmp_path: Path) -> None:
    options = {"method.local_momentum": 0.9, "train.rounds": 2}
    kept = train(str(tmp_path / "a"), "fedavg", {**options, "method.momentum_buffer": "keep"})
    reset = train(str(tmp_path / "b"), "fedavg", options)
    assert not torch.equal(kept["model"], reset["model"]) and "buffer" in kept["saved"].worker(0)["state"]


def test_the_network_of_the_public_code() -> None:
    from xutrain.data.synthetic_images import SyntheticImages
    from xutrain.models.moderate_cnn import ModerateCnn

    task = SyntheticImages.build(SyntheticImages.Options(samples=16, test_samples=4), 0)
    net = ModerateCnn.build(ModerateCnn.Options(), task)
    assert sum(p.numel() for p in net.parameters()) == 3_491_530
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_12_the_partition_of_the_public_code() -> None:
    """Sizes add up, nothing twice, at least ten samples each, the same seed the same split."""
    more = {"partition.name": "dirichlet", "partition.alpha": 0.5, "clients.steps": "own", "data.subset": "null"}
    first, second, other = (federated.build(plain("fedavg", **more, **{"seed": s}), Context(s)).parts for s in (3, 3, 4))
    rows = torch.cat([p.train for p in first])
    assert len(rows) == len(set(rows.tolist())) == 1437 and min(len(p.train) for p in first) >= 10
    assert all(torch.equal(a.train, b.train) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a.train, b.train) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_a_client_that_keeps_layers_reports_the_loss_of_the_model_that_it_uses(tmp_path: Path, method: str) -> None:
    from xutrain.loops.clients import ClientData

    value = plain(method, **changes(space=f"{{lr: {LR}}}"))
    job = federated.build(value, Context())
    setting = job.method.configure(job.server, federated.plan_round(value, job, 0))
    state = {"own": torch.randn(job.replica.numel, generator=torch.Generator().manual_seed(0))}
    wanted = job.method.served(job.server, state)
    problem = ClientData(job.bench, 1, job.parts[1], 0)
    reply = job.method.step(state, job.method.plan(job.server, setting, 1, 0).copy(), problem)
    assert reply.numbers == {"val_loss": pytest.approx(problem.evaluate(wanted)["loss"])}
    lines = train(str(tmp_path), method, changes(space=f"{{lr: {LR}}}"))["lines"]
    assert len([x for x in lines if x["name"] == "search_loss"]) == HELD["train.rounds"]


def test_a_searched_rate_is_the_rate_of_l2gds_pull() -> None:
    """c = eta (1 - q) strength / q with the drawn eta, at most 1; q = 1/(P + 1) makes it eta P strength."""
    for strength in (1.0, 4.0):
        value = plain("l2gd", **changes("frozen", f"{{lr: {LR}}}", **{"method.strength": strength}))
        job = federated.build(value, Context())
        base = federated.plan_round(value, job, 0)
        setting = job.method.configure(job.server, base)
        pull = job.method.plan(job.server, setting, 0, 0).knobs["pull"]
        assert setting.lr != base.lr and pull == pytest.approx(min(1.0, setting.lr * base.steps[0] * strength))


@pytest.mark.parametrize(
    ("method", "space", "where"),
    [
        ("softpull", "{weights: {}}", "search.space.weights"),
        ("prr_fl", "{weights: {}}", "search.space.weights"),
        ("l2gd", "{weights: {}}", "search.space.weights"),
        ("l2gd", "{local_work: {low: 2, high: 9}}", "search.space.local_work"),
        ("fedavg_lm_z", "{local_momentum: {low: 0.5, high: 2.0, ceiling: 2.0}}", "search.space.local_momentum.ceiling"),
        ("fedavg_lm_z", "{local_momentum: {low: 0.5, high: 0.9, floor: -1.0}}", "search.space.local_momentum.floor"),
        ("fedavg", "{lr: {low: 0.01, high: 0.1, floor: -1.0}}", "search.space.lr.floor"),
        ("fedavg", "{server_lr: {low: 0.5, high: 1.5, floor: 0.0}}", "search.space.server_lr.floor"),
        ("fedsm", "{lr: {low: 0.01, high: 0.1}}", "search"),
    ],
)
def test_what_a_method_cannot_use_or_bear_is_not_searched(method: str, space: str, where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plain(method, **changes("frozen", space), **({"method.mode": "extra"} if method == "fedsm" else {}))
    assert [issue.where for issue in caught.value.issues] == [where]


def test_simplex_weights_are_recorded_with_their_own_deviation() -> None:
    """Half the distance between the weights at mean + and - one deviation, of those who take part, with unequal p_k."""
    more = {"clients.weights": "samples", "partition": "{name: dirichlet, alpha: 0.3}", "clients.steps": "own", "clients.fraction": 0.75}
    value = plain("fedavg", **changes("frozen", "{weights: {form: simplex}}", **more))
    job = federated.build(value, Context())
    base, space = federated.plan_round(value, job, 0), job.method.space
    mean, std = torch.zeros(4, dtype=torch.float64), torch.full((4,), 0.01, dtype=torch.float64)
    found = space.spread(mean, std, base)
    assert sorted(found) == [f"weight_{k}" for k in base.clients]
    for i, k in enumerate(base.clients):
        moved = mean.clone()
        moved[k] = 0.01
        ends = [space.setting(sign * moved, base).weights[i] for sign in (1, -1)]
        assert found[f"weight_{k}"] == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-3)


def test_roll_outs_teach_along_the_natural_gradient_where_it_is_asked_for(tmp_path: Path) -> None:
    more = {"search.rollouts": 3, "data.val_fraction": 0.1}
    means = {}
    for rate in (0.0, 1.0):
        agent = f"{{name: gaussian, natural_gradient: true, natural_lr: {rate}}}"
        lines = train(str(tmp_path / str(rate)), "fedavg", changes(agent, f"{{server_lr: {SLR}}}", **more))["lines"]
        means[rate] = [x["value"] for x in lines if x["name"] == "policy_mean_server_lr"]
    assert means[0.0] == [1.0] * 4 and means[1.0][-1] != 1.0
    with pytest.raises(RecipeError, match=r"search\.agent\.cov"):
        plain("fedavg", **changes("{name: gaussian, natural_gradient: true, cov: diag}"))
