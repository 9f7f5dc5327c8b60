"""Clients that are lost in the middle of a round (``clients.dropout``), and the order in which replies are added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_federate_runs import equal, recipe, train

from xutrain.engine.context import Context
from xutrain.errors import RecipeError, Stopped
from xutrain.loops import federated
from xutrain.loops.absence import lose

LOST = {"clients.dropout": 0.4, "train.rounds": 3}
METHODS = ["fedavg", "fedavg_slm", "domo", "domo_s", "scaffold", "mime", "mime_lite", "fednova", "fedcm", "fedadam", "domo_cv"]
NET = {"model.name": "resnet_cifar", "model.depth": 8, "model.width": 4, "data.subset": 120, "train.local_steps": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, LOST) for name in METHODS),
    ("domo", {**LOST, "clients.fraction": 0.75}),
    ("scaffold", {**LOST, "codec": "{name: top_k, ratio: 8}"}),
    ("domo", {**LOST, **NET, "train.rounds": 2}),
    ("fedavg", {**LOST, "partition.name": "dirichlet", "partition.alpha": 0.5, "clients.steps": "own", "train.local_steps": "null"}),
]


def test_who_is_lost_is_drawn_by_key_and_never_everybody() -> None:
    value = recipe("fedavg", **{"clients.count": 40, "clients.dropout": 0.3, "train.batch_size": 2})
    drawn = [lose(value, tuple(range(40)), r) for r in range(50)]
    assert drawn[7] == lose(value, tuple(range(40)), 7) != drawn[8]
    assert abs(sum(map(len, drawn)) / (50 * 40) - 0.3) < 0.05
    few = recipe("fedavg", **{"clients.dropout": 0.99})
    assert all(len(lose(few, (0, 2, 3), r)) == 2 for r in range(20) if len(lose(few, (0, 2, 3), r)) >= 2)
    assert lose(recipe("fedavg"), (0, 1, 2, 3), 0) == ()


def test_the_round_is_the_mean_of_those_who_answer() -> None:
    value = recipe("fedavg", **{"clients.dropout": 0.5, "clients.weights": "samples"})
    job = federated.build(value, Context())
    index = next(r for r in range(50) if len(lose(value, (0, 1, 2, 3), r)) == 2)
    setting = federated.plan_round(value, job, index)
    assert len(setting.lost) == 2 and abs(sum(setting.weights) - 1) < 1e-12 and not set(setting.lost) & set(setting.clients)
    start, alone = job.server["model"].clone(), []
    for client in setting.clients:
        one = federated.build(value, Context())
        federated.play(one, replace(setting, clients=(client,), steps=setting.steps[:1], weights=(1.0,), lost=()))
        alone.append(one.server["model"])
    measured = federated.play(job, setting)
    mean = sum(w * (m - start) for w, m in zip(setting.weights, alone, strict=True)) + start
    torch.testing.assert_close(job.server["model"], mean, rtol=0, atol=1e-6)
    assert measured["clients_lost"] == 2 and [bool(t) for t in job.taken] == [k in setting.clients for k in range(4)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{len(c[1])}")
def test_forecast_and_resume_with_lost_clients(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    method, changes = case
    whole = train(str(tmp_path / "whole"), method, changes)
    forecast = federated.forecast(recipe(method, **changes))
    parts = whole["meter"].values()
    assert (forecast.up, forecast.down) == (sum(p[0] for p in parts), sum(p[1] for p in parts))
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "STOP").write_text("1")
    with pytest.raises(Stopped):
        train(str(folder), method, changes)
    (folder / "STOP").unlink()
    again = train(str(folder), method, changes)
    assert equal(whole["model"], again["model"]) and whole["metrics"] == again["metrics"] and whole["meter"] == again["meter"]


def _all(folder: str) -> list[dict[str, Any]]:
    runs = [train(f"{folder}/{i}", method, changes) for i, (method, changes) in enumerate(CASES)]
    return [{k: run[k] for k in ("model", "metrics", "meter")} for run in runs]


def test_any_number_of_processes_loses_the_same_clients(tmp_path: Path, forked: Any) -> None:
    alone = _all(str(tmp_path / "1"))
    for processes in (2, 4):
        for others in forked(_all, processes, str(tmp_path / f"{processes}")):
            for case, one, other in zip(CASES, alone, others, strict=True):
                assert equal(one, other), case


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_replies_changes_rounding_only(method: str) -> None:  # T11, float32, through the loop
    def run(order: list[int]) -> torch.Tensor:
        value = recipe(method)
        job = federated.build(value, Context())
        for index in range(3):
            plain = federated.plan_round(value, job, index)
            steps, weights = (tuple(t[k] for k in order) for t in (plain.steps, plain.weights))
            federated.play(job, job.method.configure(job.server, replace(plain, clients=tuple(order), steps=steps, weights=weights)))
        model: torch.Tensor = job.server["model"]
        return model

    torch.testing.assert_close(run([2, 0, 3, 1]), run([0, 1, 2, 3]), rtol=0, atol=1e-4 if method == "fedadam" else 1e-6)


@pytest.mark.parametrize("wrong", [1.0, -0.1, 1.5])
def test_a_probability_that_cannot_be_is_refused(wrong: float) -> None:
    with pytest.raises(RecipeError, match=r"clients\.dropout"):
        recipe("fedavg", **{"clients.dropout": wrong})
