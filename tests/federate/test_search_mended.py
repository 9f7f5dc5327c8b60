"""Rounds that a search throws away, and trainings that it begins anew, leave no trace: at the server, at the clients, in the statistics.
Roll-outs draw again what the server alone uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_federate_runs import recipe
from test_search_runs import HELD, LR

from xutrain.engine.context import Context
from xutrain.errors import RecipeError
from xutrain.loops import federated
from xutrain.loops.clients import ClientData
from xutrain.methods.federate.double_momentum import DoubleMomentum

NET = {"model": "{name: resnet_cifar, depth: 8, width: 2}", "data.subset": 80, "train.local_steps": 1}


def job_of(method: str, space: str, agent: str = "gaussian", **more: Any) -> tuple[Any, federated.Job]:
    value = recipe(method, **{**HELD, "search": f"{{agent: {agent}, space: {space}}}", **more})
    return value, federated.build(value, Context(value.seed))


def play(value: Any, job: federated.Job, rounds: int) -> Any:
    """Rounds of a job, one after the other; yields its index after each."""
    for index in range(rounds):
        federated.play(job, job.method.configure(job.server, federated.plan_round(value, job, index)))
        yield index


def break_once(monkeypatch: pytest.MonkeyPatch, what: str, round: int) -> None:
    """Client 2 answers nonsense once, when it is asked for the ``round``-th time."""
    evaluate, gradient, said = ClientData.evaluate, ClientData.gradient, {"loss": -1, "gradient": -1}

    def bad_loss(self: ClientData, point: torch.Tensor, split: str = "val") -> dict[str, float]:
        said["loss"] += self.client == 2
        bad = what == "loss" and self.client == 2 and said["loss"] == round
        return {"loss": float("inf")} if bad else evaluate(self, point, split)

    def bad_gradient(self: ClientData, point: torch.Tensor, step: int) -> torch.Tensor:
        found = gradient(self, point, step)
        said["gradient"] += self.client == 2 and step == 0
        return found * float("nan") if what == "gradient" and self.client == 2 and said["gradient"] == round else found

    monkeypatch.setattr(ClientData, "evaluate", bad_loss)
    monkeypatch.setattr(ClientData, "gradient", bad_gradient)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_clients_go_back_with_the_server(lag: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCAFFOLD's c is the sum of p_k c_k after every round that stands, though c_k never travels and the drawn weights differ."""
    break_once(monkeypatch, what, 3)
    value, job = job_of("scaffold", f"{{lr: {LR}, weights: {{}}}}", **{"search.lag": lag})
    told = 0
    for index in play(value, job, 7):
        held, told = job.server["search"], told + job.uplink.ctx.meter.state().get("undo", [0, 0])[1] // 32
        if held["undo"]:
            continue  # the clients learn of it with their next plan
        total = sum(job.kept[k].state["control"] for k in range(4)) / 4
        assert torch.allclose(job.server["control"], total, atol=1e-6), index
    assert job.method.lost(job.server) == 1 and told, "the clients are told, and it is counted"


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_momentum_is_inferred_after_a_lost_round(lag: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_once(monkeypatch, what, 3)
    value, job = job_of("domo", f"{{lr: {LR}, beta: {{low: 0.1, high: 1.0}}, server_lr: {{low: 0.5, high: 1.0}}}}", **{"search.lag": lag})
    agreed = follow(monkeypatch, job)
    assert list(play(value, job, 7)) and job.method.lost(job.server) == 1 and len(agreed) == 4 * 7
    assert all(agreed)


def follow(monkeypatch: pytest.MonkeyPatch, job: federated.Job) -> list[bool]:
    """Whether each client's inferred momentum was the server's."""
    agreed: list[bool] = []
    infer = DoubleMomentum.server_direction

    def compared(self: DoubleMomentum, state: Any, plan: Any) -> Any:
        found = infer(self, state, plan)
        agreed.append(torch.allclose(job.server["momentum"], torch.zeros(()) if found is None else found, rtol=1e-3, atol=1e-4))
        return found

    monkeypatch.setattr(DoubleMomentum, "server_direction", compared)
    return agreed


def test_clients_with_rates_of_their_own_infer_the_servers_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server multiplies by the mean rate, so the clients are sent it."""
    value, job = job_of("domo", f"{{lr: {LR[:-1]}, per_client: true}}, beta: {{low: 0.1, high: 1.0}}}}")
    agreed = follow(monkeypatch, job)
    assert list(play(value, job, 4)) and all(agreed)
    assert job.bench.ctx.meter.state()["round_lr"] == [0, 4 * 4 * 32]
    predicted = federated.forecast(value).details["parts"]
    assert {n: [p["up"], p["down"]] for n, p in predicted.items()} == job.bench.ctx.meter.state()


@pytest.mark.parametrize("lag", [0, 1])
def test_statistics_come_back_with_the_model(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of round 3 is not finite: the model from before round 2 comes back with its own batch-norm statistics."""
    break_once(monkeypatch, "loss", 3)
    value, job = job_of("fedavg", f"{{lr: {LR}}}", **{**NET, "search.lag": lag})
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    gradient = ClientData.gradient

    def watched(self: ClientData, point: torch.Tensor, step: int) -> torch.Tensor:
        if self.client == 0 and step == 0:
            seen.append((job.server["model"].clone(), job.buffers.clone()))
        return gradient(self, point, step)

    monkeypatch.setattr(ClientData, "gradient", watched)
    assert list(play(value, job, 5)) and job.method.lost(job.server) == 1
    again = 3 if lag == 0 else 4  # with lag 1 the loss comes when round 3 has trained from the model already
    assert torch.equal(seen[again][0], seen[2][0]) and torch.equal(seen[again][1], seen[2][1])
    assert not torch.equal(seen[3 - lag][1], seen[1][1])


def test_a_random_search_serves_its_best_model_with_its_own_statistics() -> None:
    value, job = job_of("fedavg", f"{{lr: {LR}}}", "{name: random, trials: 2}", **NET)
    held, after = job.server["search"], {}
    for index in play(value, job, 3):
        after[index] = (job.server["model"].clone(), job.buffers.clone())
    held["best_loss"] = -1.0  # whatever the second training reaches, the first is served
    federated.play(job, job.method.configure(job.server, federated.plan_round(value, job, 3)))
    assert torch.equal(job.server["model"], after[1][0]) and torch.equal(job.buffers, after[1][1])


def test_trainings_of_a_random_search_share_nothing() -> None:
    """Same values drawn twice: the second training repeats the first, residuals of the codec and control variates included."""
    codec = {"codec": "{name: top_k, ratio: 8}", "train.local_epochs": 1, "train.local_steps": "null", "train.batch_size": 48}
    value, job = job_of("scaffold", "{lr: {low: 0.0999999999, high: 0.1000000001}}", "{name: random, trials: 2}", **codec)
    models = [job.server["model"].clone() for _ in play(value, job, 4)]
    assert all(shard.per_pass == 1 and len(shard.train) == 48 for shard in job.parts), "every step sees all samples"
    assert torch.allclose(models[0], models[2], atol=1e-6) and not torch.allclose(models[0], models[1], atol=1e-4)


def test_a_random_search_shares_its_rounds_nearly_equally() -> None:
    _, job = job_of("fedavg", f"{{lr: {LR}}}", "{name: random, trials: 4}", **{"train.rounds": 10})
    trials = [job.method.trial(i) for i in range(10)]  # type: ignore[attr-defined]
    assert [trials.count(t) for t in range(4)] == [3, 2, 3, 2]
    assert [job.method.since(i) for i in range(10)] == [trials.index(t) for t in trials]  # type: ignore[attr-defined]


def test_a_residual_survives_an_answer_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    break_once(monkeypatch, "gradient", 2)
    value, job = job_of("fedavg", f"{{lr: {LR}}}", **{"codec": "{name: top_k, ratio: 8}"})
    assert list(play(value, job, 5))
    assert all(torch.isfinite(t).all() for kept in job.kept.values() for t in kept.residual.values())
    assert torch.isfinite(job.server["model"]).all()


def rolled_out(space: str, **more: Any) -> tuple[federated.Job, list[list[tuple[Any, float]]]]:
    """A job whose roll-outs are written down: for every round the (merged Round, loss) of each."""
    held = {"search.rollouts": 4, "search.rollout_apply": "best", "data.val_fraction": 0.1, **more}
    value, job = job_of("fedavg", space, **held)
    method: Any = job.method
    tried: list[list[tuple[Any, float]]] = []
    merge, judge = method.inner.merge, method.judge
    rounds: list[Any] = []

    def merged(server: Any, setting: Any, replies: Any, exchange: int = 0) -> None:
        rounds.append(setting)
        merge(server, setting, replies, exchange)

    def judged(model: torch.Tensor) -> float:
        loss: float = judge(model)
        if rounds:
            tried[-1].append((rounds.pop(), loss))
        else:
            tried.append([])
        return loss

    method.inner.merge, method.judge = merged, judged
    assert list(play(value, job, 3))
    return job, tried


def test_roll_outs_leave_alone_what_the_clients_worked_with() -> None:
    job, tried = rolled_out("{local_momentum: {low: 0.1, high: 0.8}, weights: {}, server_lr: {low: 0.5, high: 1.5}}")
    for round in tried:
        assert len({setting.knobs["local_momentum"] for setting, _ in round}) == 1
        assert len({setting.knobs["server_lr"] for setting, _ in round}) == len({setting.weights for setting, _ in round}) == 4
    means = job.server["search"]["agent"]["params"]["mean"]
    assert means[0].abs() > 0 and (means[1:].abs() > 0).all(), "the window teaches the momentum, the roll-outs teach the rest"


def test_the_record_says_which_roll_out_was_taken() -> None:
    job, tried = rolled_out("{weights: {form: simplex}, server_lr: {low: 0.5, high: 1.5}}")
    best, _ = min(tried[-1], key=lambda pair: pair[1])
    shown = job.server["search"]["shown"]
    assert [shown[f"sample_weight_{k}"] for k in range(4)] == pytest.approx(best.weights)
    assert shown["sample_server_lr"] == pytest.approx(best.knobs["server_lr"]) and best is not tried[-1][0][0]


def test_roll_outs_beside_dirichlet_weights() -> None:
    _, tried = rolled_out("{weights: {form: dirichlet}, server_lr: {low: 0.5, high: 1.5}}")
    assert all(len({setting.weights for setting, _ in round}) == 1 for round in tried)


def test_roll_outs_need_a_value_of_the_server() -> None:
    with pytest.raises(RecipeError, match="nothing to roll out") as caught:
        rolled_out("{local_momentum: {low: 0.1, high: 0.8}}")
    assert caught.value.issues[0].where == "search.rollouts"
