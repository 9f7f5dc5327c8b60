"""Virtual time: exact periods, staleness, counted bits, resumption, processes, and what asynchrony gains (T9, T10, T12, T14, T15)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vertical.conftest import BC3, recipe_of, run_through
from tests.vertical.vertical_sums import objective, weights
from xutrain.engine.context import Context
from xutrain.engine.meter import BitMeter
from xutrain.loops import vertical

Q4 = {"name": "breast_cancer", "parties": 4}
JOBS = [
    {"method": {"name": "afsgd"}, "security__mode": "pairwise"},
    {"method": {"name": "afsgd"}, "security__mode": "tree", "train__batch_size": 8},
    {"method": {"name": "afsvrg"}, "data": Q4, "security__mode": "tree", "train__in_flight": 3},
    {"method": {"name": "afsvrg", "snapshot": "barrier", "inner": 100}, "train__mode": "sync"},
    {"method": {"name": "afsaga"}, "train__budget": "total", "time": {"slow_party": "error", "delay": 2.0}},
    {"method": {"name": "vfb2", "estimator": "svrg", "inner": 200}, "labels": ["worst"], "security__mode": "pairwise"},
    {"method": {"name": "vfb2", "estimator": "saga"}, "labels": ["mean", "worst"]},
    {"method": {"name": "fd_svrg", "inner": 300}, "train__mode": "sync"},
    {"method": {"name": "fdml"}, "data": {"name": "digit_quadrants"}, "loss": "softmax", "train__mode": "sync", "train__batch_size": 64},
    {"method": {"name": "central", "estimator": "saga"}},
]


@pytest.mark.parametrize("changes", JOBS)
def test_counted_bits_equal_the_forecast(changes):
    recipe = recipe_of(**{"train__epochs": 1.3, **changes})
    job = run_through(recipe)
    meter = BitMeter()
    job.net.count(meter)
    predicted = vertical.forecast(recipe)
    assert (meter.up, meter.down, job.net.steps) == (predicted.up, predicted.down, predicted.steps)
    ledger = job.net.ledger()
    assert sum(line["bytes"] for p in range(job.plan.q) for line in ledger.lines(p, job.plan.names)) * 8 == meter.up
    assert not job.net.mail and not job.net.left


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ({"security__mode": "plain"}, 3 * (32 + 64)),
        ({"security__mode": "pairwise"}, 3 * (32 + 64)),
        ({"security": {"mode": "tree", "trees": "chain"}}, 3 * 32 + 2 * 3 * 64),
        ({"security__mode": "tree"}, 3 * 32 + 2 * 3 * 64 + 64),  # the best pair has another root in T2: one message more
        ({"method": {"name": "vfb2"}, "labels": ["party0"]}, 3 * (32 + 64) + 3 * (64 + 32)),
    ],
)
def test_bits_of_one_update(changes, each):
    recipe = recipe_of(**{"data": Q4, "train__epochs": None, "train__steps": 10, **changes})
    predicted = vertical.forecast(recipe)
    assert predicted.up == each * predicted.steps


def test_bits_of_a_snapshot():
    n, q = 569, 3
    plain = recipe_of(method={"name": "afsvrg"}, train__steps=2 * n + 5, train__epochs=None)
    tree = recipe_of(method={"name": "afsvrg"}, train__steps=2 * n + 5, train__epochs=None, security={"mode": "tree", "trees": "chain"})
    assert vertical.forecast(plain).details["parts"]["pass"]["up"] == 2 * n * (q - 1) * 64
    parts = vertical.forecast(tree).details["parts"]
    steps = 3 * (2 * n + 5)
    assert parts["pass"]["up"] + parts["masks"]["up"] - steps * (q - 1) * 64 == 2 * 2 * n * (q - 1) * 64
    assert parts["reference"]["up"] == 2 * n * (q - 1) * 64


def test_periods_are_exact(run):
    slow = {"latency": 0.25, "slow_party": "worst", "delay": 1.5}
    lock, _ = run(train={"steps": 40, "mode": "sync", "lr": 0.01, "weight_decay": 0.01}, time=slow)
    assert lock.net.now == pytest.approx(40 * (0.5 + 2.5), abs=1e-9)
    free, _ = run(train={"steps": 40, "lr": 0.01, "weight_decay": 0.01}, time=slow)
    assert free.net.now == pytest.approx(40 * (0.5 + 2.5), abs=1e-9)  # the slow one's own period
    even, _ = run(train={"steps": 40, "lr": 0.01, "weight_decay": 0.01})
    assert even.net.now == pytest.approx(40 * 1.5, abs=1e-9)
    one, _ = run(method={"name": "central"}, train={"steps": 40, "lr": 0.01, "weight_decay": 0.01})
    assert one.net.now == pytest.approx(40, abs=1e-9)


@pytest.mark.parametrize("parties", [4, 8])
def test_staleness(run, parties):
    data = {"name": "breast_cancer", "parties": parties}
    even, _ = run(data=data, train__epochs=0.5)
    assert even.net.staleness == parties - 1
    slow, _ = run(data=data, train__epochs=0.5, time={"slow_party": "party1", "delay": 2.0})
    assert slow.net.staleness <= (parties - 1) * int(np.ceil((0.25 + 3.0) / 1.5))
    assert slow.net.staleness >= 2 * (parties - 1)


@pytest.mark.parametrize("changes", [JOBS[2], JOBS[3], JOBS[5], JOBS[6], JOBS[7]])
def test_a_resumed_run_is_bit_equal(changes):
    recipe = recipe_of(**{"train__epochs": 1.2, **changes})
    whole = run_through(recipe)
    half = vertical.build(recipe, Context(recipe.seed))
    for seat in half.seats:
        seat.begin(half.net)
    while half.net.steps < 777 and half.net.step():
        pass
    rest = vertical.build(recipe, Context(recipe.seed))
    rest.net.load_state(vertical._arrays(vertical._tensors(half.net.state())))
    for p, method in rest.methods.items():
        method.load_state(vertical._arrays(vertical._tensors(half.methods[p].state())))
    while rest.net.step():
        pass
    assert np.array_equal(weights(rest), weights(whole))
    assert (rest.net.now, rest.net.steps, rest.net.sent) == (whole.net.now, whole.net.steps, whole.net.sent)


def _hosted(changes):
    recipe = recipe_of(**changes)
    ctx = Context.open(recipe.seed)
    job = vertical.build(recipe, ctx)
    for seat in job.seats:
        seat.begin(job.net)
    while job.net.step():
        pass
    return {p: job.methods[p].weights for p in job.workers.hosted}, job.net.now


@pytest.mark.parametrize("changes", [JOBS[0], JOBS[5]])
def test_any_number_of_processes_gives_the_same_bits(forked, changes):
    changes = {**changes, "train__epochs": 0.1}
    (alone, now) = _hosted(changes)
    for hosted, there in forked(_hosted, 3, changes):
        assert there == now
        for p, w in hosted.items():
            assert np.array_equal(w, alone[p])


def _time_to(target, seed=0, **changes):
    """Virtual time at which the gap first falls below ``target``, looked at every half epoch."""
    recipe = recipe_of(seed=seed, **changes)
    job = vertical.build(recipe, Context(seed))
    for seat in job.seats:
        seat.begin(job.net)
    look = 569 * len(job.plan.active) // 4
    seen = 0
    while job.net.step():
        if job.net.steps >= seen + look:
            seen = job.net.steps
            if objective(job) - BC3 < target:
                return job.net.now
    raise AssertionError("target not reached")


def test_asynchrony_pays_for_sgd_with_a_straggler():
    shared = {
        "data": {"name": "breast_cancer", "parties": 8},
        "time": {"slow_party": "party1", "delay": 1.0},
        "train__lr": 0.01,
        "train__epochs": 12,
    }
    lock = _time_to(5e-3, train__mode="sync", **shared)
    free = _time_to(5e-3, train__budget="total", **shared)
    assert lock / free > 1.4


def test_published_svrg_gains_nothing_but_is_not_much_slower():
    shared = {"data": Q4, "time": {"slow_party": "party1", "delay": 1.0, "full_pass": 0.0}, "train__lr": 0.03, "train__epochs": 24}
    barrier = {"name": "afsvrg", "snapshot": "barrier"}
    lock = _time_to(1e-5, method=barrier, train__mode="sync", **shared)
    free = _time_to(1e-5, method=barrier, **shared)
    assert 0.85 < lock / free < 1.2


def test_rolling_snapshots_and_compensated_steps_restore_the_gain():
    shared = {"data": Q4, "time": {"slow_party": "party1", "delay": 2.0, "full_pass": 0.0}, "train__lr": 0.03, "train__epochs": 24}
    lock = _time_to(1e-5, method={"name": "afsvrg", "snapshot": "barrier"}, train__mode="sync", **shared)
    free = _time_to(1e-5, method={"name": "afsvrg"}, train__budget="total", train__rates="compensated", **shared)
    assert lock / free > 1.4


def test_two_parties_are_told_that_masks_protect_nothing():
    job = vertical.build(recipe_of(data={"name": "breast_cancer", "parties": 2}, security__mode="pairwise"), Context(0))
    assert any("two parties: masks protect nothing" in text for text in vertical.remarks(recipe_of(), job))
