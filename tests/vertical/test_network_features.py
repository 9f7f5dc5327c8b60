"""What the simulation can do, real parties do too: trees, softmax, several label holders, shared budgets, compensated steps."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.vertical.conftest import run_through
from tests.vertical.party_jobs import join, network_job, run_parties, start_party
from tests.vertical.vertical_sums import objective
from xutrain.errors import RecipeError
from xutrain.loops import vertical
from xutrain.methods.vertical.transports.rounds import Rates
from xutrain.recipe.load import from_dict

pytest.importorskip("grpc")
pytest.importorskip("cryptography")


def base(**more: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "data": {"name": "breast_cancer"},
        "method": {"name": "vfb2"},
        "labels": ["mean"],
        "train": {"epochs": 2, "batch_size": 32, "lr": 0.05, "weight_decay": 0.01, "mode": "sync"},
        "eval": {"every_epochs": None, "reference": False},
    }
    for key, value in more.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw and key != "method" else value
    return raw


def simulated(raw: dict[str, Any]) -> Any:
    return run_through(from_dict("vertical", raw))


def ledger(folder: Any, party: str) -> dict[tuple[str, str], tuple[int, int]]:
    lines = [json.loads(line) for line in (folder / "out" / party / f"ledger.{party}.jsonl").read_text().splitlines()]
    return {(line["kind"], line["to"]): (line["messages"], line["bytes"]) for line in lines}


@pytest.mark.parametrize(("parties", "holders"), [(3, [0]), (4, [1]), (5, [0])])
def test_tree_sums_over_the_network_are_the_simulation(tmp_path, parties, holders):
    names = ["mean", "error", "worst"] if parties == 3 else [f"party{p}" for p in range(parties)]
    raw = base(data={"parties": parties}, labels=[names[h] for h in holders], security={"mode": "tree"})
    results, _ = run_parties(network_job(tmp_path, raw), tmp_path)
    assert not any(isinstance(r, BaseException) for r in results.values()), results
    assert results[names[holders[0]]]["objective"] == pytest.approx(objective(simulated(raw)), abs=1e-7)
    steps = 2 * (569 // 32)
    sent = [ledger(tmp_path, p) for p in names]
    masks = sum(count for book in sent for (kind, _), (count, _) in book.items() if kind == "masks")
    products = sum(count for book in sent for (kind, _), (count, _) in book.items() if kind == "product")
    indices = sum(size for book in sent for (kind, _), (_, size) in book.items() if kind == "index")
    assert products == steps * (parties - 1)
    assert indices == steps * (parties - 1) * 32 * 4
    assert masks in ((steps + 1) * (parties - 1), (steps + 1) * parties)  # one more where T2 has another root; one evaluation


def test_softmax_over_the_network_is_the_simulation(tmp_path):
    raw = base(data={"name": "digit_quadrants"}, labels=["top_left"], loss="softmax", train={"epochs": 1, "batch_size": 64, "lr": 0.2})
    recipe = network_job(tmp_path, raw)
    results, _ = run_parties(recipe, tmp_path)
    assert results["top_left"]["objective"] == pytest.approx(objective(run_through(recipe)), abs=1e-7)  # the same files, standardised
    assert results["top_left"]["train_accuracy"] > 0.5


@pytest.mark.parametrize("method", [{"name": "afsgd"}, {"name": "afsvrg", "snapshot": "barrier"}, {"name": "afsaga"}])
def test_several_label_holders_in_lock_step_are_the_simulation(tmp_path, method):
    raw = base(method=method, labels="all", train={"epochs": 3})
    results, processes = run_parties(network_job(tmp_path, raw), tmp_path)
    assert not any(isinstance(r, BaseException) for r in results.values()), results
    job = simulated(raw)
    assert results["mean"]["objective"] == pytest.approx(objective(job), abs=1e-7)
    for at, p in enumerate(("mean", "error", "worst")):
        assert np.abs(processes[p].seat.method.weights - job.methods[at].weights).max() < 1e-7


@pytest.mark.parametrize("estimator", ["sgd", "saga", "svrg"])
def test_two_dominators_in_lock_step(tmp_path, estimator):
    raw = base(method={"name": "vfb2", "estimator": estimator}, labels=["mean", "worst"], train={"epochs": 3, "lr": 0.02})
    results, _ = run_parties(network_job(tmp_path, raw), tmp_path)
    assert results["mean"]["objective"] == pytest.approx(objective(simulated(raw)), abs=1e-7)


@pytest.mark.parametrize(
    ("method", "holders", "mode"),
    [
        ({"name": "vfb2", "estimator": "svrg"}, ["mean"], "pairwise"),
        ({"name": "afsvrg", "snapshot": "barrier", "inner": 7}, ["mean", "error", "worst"], "plain"),
        ({"name": "vfb2", "estimator": "saga"}, ["error", "worst"], "pairwise"),
    ],
)
def test_what_leaves_real_parties_is_the_forecast_to_the_byte(tmp_path, method, holders, mode):
    raw = base(method=method, labels=holders, security={"mode": mode}, train={"epochs": None, "steps": 23, "batch_size": 29, "lr": 0.01})
    recipe = network_job(tmp_path, raw)
    results, _ = run_parties(recipe, tmp_path)
    assert not any(isinstance(r, BaseException) for r in results.values()), results
    sent: Counter[str] = Counter()
    for p in recipe.party_names:
        for (kind, _), (_, size) in ledger(tmp_path, p).items():
            sent[kind] += 8 * size
    evaluation = 2 * 64 * (569 + 1)  # the simulation's observer looks for nothing; real parties send their part, and their norm
    assert sent.pop("evaluation") == evaluation
    assert sent == {part: cost["up"] for part, cost in vertical.forecast(from_dict("vertical", raw)).details["parts"].items()}


def test_lock_step_of_several_goes_on_after_a_loss(tmp_path):
    """Checkpoints of different rounds: the marks in the greetings let everybody go on."""
    raw = base(method={"name": "afsgd"}, labels="all", train={"epochs": 3})
    run_parties(network_job(tmp_path, raw), tmp_path)
    for p, taken in (("mean", 40), ("error", 38), ("worst", 39)):
        path = tmp_path / "out" / p / "state.npz"
        with np.load(path) as saved:
            arrays = {k: saved[k] for k in saved.files}
        arrays |= {"count.taken": np.array(taken), "count.rounds": np.array(taken)}
        np.savez(path, **arrays)
    results, processes = run_parties(network_job(tmp_path, raw), tmp_path)
    assert all(not isinstance(r, BaseException) for r in results.values()), results
    assert all(process.seat.taken == 3 * (569 // 32) for process in processes.values())


def test_requests_are_answered_while_a_step_is_computed(tmp_path):
    """Nobody waits for another's computation: the others take all their steps while the slow party is still at its first."""
    raw = base(method={"name": "afsgd"}, labels="all", train={"epochs": None, "steps": 3, "mode": "async"})
    computing, go_on = threading.Event(), threading.Event()

    def slow(process):
        def work(party, k):
            computing.set()
            assert go_on.wait(60)
            process.port.events.put(("worked", k, None))

        process.port.work = work

    recipe, results = network_job(tmp_path, raw), {}
    started = {p: start_party(recipe, tmp_path, p, results, before=slow if p == "worst" else None) for p in recipe.party_names}
    assert computing.wait(60)
    until = time.monotonic() + 60
    while started["mean"][0].seat.taken + started["error"][0].seat.taken < 6 and time.monotonic() < until:
        time.sleep(0.01)
    taken = {p: process.seat.taken for p, (process, _) in started.items()}
    go_on.set()
    join(thread for _, thread in started.values())
    assert taken == {"mean": 3, "error": 3, "worst": 0}
    assert not any(isinstance(r, BaseException) for r in results.values()), results


def test_a_slow_party_takes_longer_steps_and_fewer_of_them(tmp_path):
    steps = 40
    raw = base(
        method={"name": "afsgd"},
        labels="all",
        train={"epochs": None, "steps": steps, "mode": "async", "rates": "compensated", "budget": "total", "lr": 0.005},
        network={"step_ms": 30.0},
        time={"slow_party": "worst", "delay": 9.0},
    )
    results, processes = run_parties(network_job(tmp_path, raw), tmp_path)
    assert not any(isinstance(r, BaseException) for r in results.values()), results
    taken = {p: process.seat.taken for p, process in processes.items()}
    assert 3 * steps <= sum(taken.values()) <= 3 * steps + 6
    assert taken["worst"] < min(taken["mean"], taken["error"])
    assert processes["worst"].seat.method.lr > 0.005


def test_step_sizes_make_up_for_the_period_that_was_seen(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("xutrain.methods.vertical.transports.rounds.time", SimpleNamespace(monotonic=lambda: now[0]))
    rates = Rates(0.01, longest=0.025)
    for tick in range(60):
        now[0] = 0.1 * tick
        rates.note("fast")
        if tick % 2 == 0:
            rates.note("half")
        if tick % 10 == 0:
            rates.note("tenth")
    assert rates.lr("fast") == pytest.approx(0.01)
    assert rates.lr("half") == pytest.approx(0.02)
    assert rates.lr("tenth") == 0.025  # no longer than the block's longest stable step
    assert rates.lr("nobody") == 0.01


def test_what_real_parties_still_cannot_do_is_said(tmp_path):
    raw = base(data={"name": "digit_quadrants"}, labels=["top_left"], loss="softmax")
    recipe = network_job(tmp_path, raw)
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": None})})
    from xutrain.loops.vertical_job import network_issues

    assert any("how many classes" in i.what for i in network_issues(without))
    network = recipe.network.model_copy(update={"addresses": {"top_left": "here", "top_right": "[::1]:7", "bottom_left": "[::1]:7"}})
    said = " ".join(i.what for i in network_issues(recipe.model_copy(update={"network": network})))
    assert "no address for bottom_right" in said and "is no host:port" in said and "top_right and bottom_left have the same" in said
    trees = base(data={"parties": 4}, labels=["party0"], security={"mode": "tree"}, network={"lost": "go_on"})
    (tmp_path / "four").mkdir()
    with pytest.raises(RecipeError, match="trees are fixed"):
        run_parties(network_job(tmp_path / "four", trees), tmp_path / "four")
