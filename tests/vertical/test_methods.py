"""The mathematics of the methods: estimators, limits, golden optima, convergence (T1-T6, T13, T15)."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from scipy import sparse

from tests.vertical.conftest import BC3, recipe_of
from tests.vertical.vertical_sums import objective, weights
from xutrain import registry
from xutrain.methods.vertical.afsaga import AFSAGA
from xutrain.methods.vertical.afsgd import AFSGD
from xutrain.methods.vertical.afsvrg import AFSVRG
from xutrain.methods.vertical.central import optimum
from xutrain.methods.vertical.fdml import FDML
from xutrain.methods.vertical.losses import LOSSES, Logistic, Softmax, sigmoid
from xutrain.methods.vertical.measure import References, auc, ks

FORMS = [("afsgd", {}), ("afsvrg", {"snapshot": "barrier"}), ("afsaga", {}), ("afsaga", {"table": "official"})]


def _data(**options):
    cls = registry.load("dataset", "breast_cancer")
    return cls.build(cls.Options(name="breast_cancer", **options), 0)


@pytest.mark.parametrize(
    ("rows", "l2", "expected"), [(False, 1e-2, BC3), (False, 1e-4, 0.04344631442865036), (True, 1e-4, 0.0656205025745244)]
)
def test_golden_optima(rows, l2, expected):
    data = _data(normalise_rows=rows)
    assert optimum(data.pooled().parties[0].train, data.y, Logistic(), l2)[1] == pytest.approx(expected, abs=1e-12)


def test_golden_optima_of_single_parties():
    recipe = recipe_of(eval={"alone": True})
    found = References(recipe, _data()).alone
    expected = {"mean": (0.18337299, 0.98642), "error": (0.34005280, 0.94168), "worst": (0.14301917, 0.99243)}
    for name, (f, area) in expected.items():
        assert found[f"objective_alone_{name}"] == pytest.approx(f, abs=1e-8)
        assert found[f"auc_alone_{name}"] == pytest.approx(area, abs=1e-5)


@pytest.mark.parametrize(("name", "more"), FORMS)
@pytest.mark.parametrize("parties", [3, 8])
def test_lock_step_is_centralised(run, name, more, parties):
    estimator = {"afsgd": "sgd", "afsvrg": "svrg", "afsaga": "saga"}[name]
    job, _ = run(method={"name": name, **more}, train__mode="sync", data={"name": "breast_cancer", "parties": parties}, train__epochs=1.5)
    if more.get("table") == "official":
        reference, _ = run(
            method={"name": name, **more}, train__mode="sync", data={"name": "breast_cancer", "parties": 1}, train__epochs=1.5
        )
    else:
        reference, _ = run(method={"name": "central", "estimator": estimator, "snapshot": "barrier"}, train__mode="sync", train__epochs=1.5)
    assert np.abs(weights(job) - weights(reference)).max() < 1e-12


@pytest.mark.parametrize("estimator", ["sgd", "svrg", "saga"])
def test_backward_updating_without_delay_is_centralised(run, estimator):
    job, _ = run(method={"name": "vfb2", "estimator": estimator}, labels=["mean"], train__mode="sync", train__epochs=1.5)
    reference, _ = run(method={"name": "central", "estimator": estimator}, train__epochs=1.5)
    assert np.abs(weights(job) - weights(reference)).max() < 1e-12


def test_fd_svrg_is_lock_step_svrg(run):
    job, _ = run(method={"name": "fd_svrg"}, train__mode="sync", train__epochs=1.5)
    reference, _ = run(method={"name": "afsvrg", "snapshot": "barrier"}, train__mode="sync", train__epochs=1.5)
    assert np.array_equal(weights(job), weights(reference))


def _estimators(seed=1):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((40, 5)), rng.choice([-1.0, 1.0], 40)
    for cls, options in [(AFSGD, {}), (AFSVRG, {}), (AFSAGA, {}), (AFSAGA, {"table": "official"})]:
        yield cls(cls.Options(name="x", **options), x, Logistic(), lr=0.1, l2=0.01), x, y, rng


def _steps(method, y, state):
    """The direction of every single-sample step at the same state."""
    directions = []
    for i in range(len(y)):
        method.load_state(state)
        before = method.weights.copy()
        rows = np.array([i])
        method.apply(rows, method.signal(method.contribution(rows), y[rows]))
        directions.append((before - method.weights) / method.lr)
    return np.array(directions)


def test_estimators_are_unbiased_at_any_point_and_table():
    for method, x, y, rng in _estimators():
        if hasattr(method, "refer"):
            with contextlib.suppress(NotImplementedError):
                method.refer(method.loss.theta(rng.standard_normal(40), y))
        state = {k: np.array(v) for k, v in method.state().items()}
        state["weights"] = rng.standard_normal(5)
        gradient = x.T @ method.loss.theta(x @ state["weights"], y) / 40 + 0.01 * state["weights"]
        if getattr(method, "whole", False):  # its mean holds whatever the table holds
            gradient = (
                x.T @ method.loss.theta(x @ state["weights"], y) / 40
                + 0.01 * state["weights"]
                - state["table"].mean(axis=0)
                + state["average"]
            )
        assert np.abs(_steps(method, y, state).mean(axis=0) - gradient).max() < 1e-12


def test_variance_reduced_steps_vanish_at_the_optimum():
    for method, x, y, _ in _estimators():
        w, _ = optimum(x, y, Logistic(), 0.01)
        method.weights[:] = w
        theta = method.loss.theta(x @ w, y)
        if isinstance(method, AFSGD):
            assert np.abs(_steps(method, y, {"weights": w})).max() > 1e-3
            continue
        method.refer(theta)
        if getattr(method, "whole", False):
            method.table += 0.01 * w
            method.average += 0.01 * w
        state = {k: np.array(v) for k, v in method.state().items()}
        assert np.abs(_steps(method, y, state)).max() < 1e-12


def test_saga_updates_a_repeated_sample_once():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 3)), np.ones(6)
    for table in ("scalar", "official"):
        method = AFSAGA(AFSAGA.Options(name="afsaga", table=table), x, Logistic(), lr=0.1, l2=0.0)
        method.refer(method.loss.theta(np.zeros(6), y))
        rows = np.array([2, 2, 4])
        method.apply(rows, np.array([0.3, 0.3, -0.1]))
        table_mean = method.table.mean(axis=0) if table == "official" else method.table @ x / 6
        assert np.abs(method.average - table_mean).max() < 1e-15


def test_dense_and_sparse_agree():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 7)) * (rng.random((30, 7)) < 0.3)
    y = rng.choice([-1.0, 1.0], 30)
    for cls in (AFSGD, AFSVRG, AFSAGA):
        pair = [cls(cls.Options(name="x"), features, Logistic(), lr=0.1, l2=0.01) for features in (x, sparse.csr_matrix(x))]
        for method in pair:
            for k in range(20):
                rows = np.array([k % 30, (7 * k) % 30])
                method.apply(rows, method.signal(method.contribution(rows), y[rows]))
        assert np.abs(pair[0].weights - pair[1].weights).max() < 1e-14


@pytest.mark.parametrize("name", list(LOSSES))
def test_theta_is_the_derivative(name):
    rng = np.random.default_rng(0)
    loss = LOSSES[name]()
    z = rng.standard_normal((5, 3)) if name == "softmax" else rng.standard_normal(5) * 4
    y = rng.integers(3, size=5) if name == "softmax" else rng.choice([-1.0, 1.0], 5)
    step = rng.standard_normal(z.shape)
    slope = (loss.value(z + 1e-6 * step, y) - loss.value(z - 1e-6 * step, y)) / 2e-6
    assert slope == pytest.approx(float((loss.theta(z, y) * step).sum()) / 5, abs=1e-8)


def test_theta_is_stable_for_large_products():
    with np.errstate(all="raise", under="ignore"):
        assert np.array_equal(Logistic().theta(np.array([800.0, -800.0]), np.array([1.0, 1.0])), np.array([-0.0, -1.0]))
        assert np.array_equal(sigmoid(np.array([-900.0, 900.0])), np.array([0.0, 1.0]))


def test_fdml_exact_factor_is_the_chain_rule():
    rng = np.random.default_rng(0)
    blocks, y = [rng.standard_normal((1, 4)) for _ in range(3)], np.array([2])
    parties = [FDML(FDML.Options(name="fdml"), x, Softmax(), lr=1.0, l2=0.0, outputs=3, parties=3) for x in blocks]
    for p in parties:
        p.weights[:] = rng.standard_normal((4, 3))

    def value():
        return parties[0].objective(sum(p.contribution() for p in parties), y)

    before, h = parties[1].weights.copy(), 1e-6
    numeric = np.zeros((4, 3))
    for at in np.ndindex(4, 3):
        for sign in (1, -1):
            parties[1].weights[:] = before
            parties[1].weights[at] += sign * h
            numeric[at] += sign * value() / (2 * h)
    parties[1].weights[:] = before
    rows = np.array([0])
    parties[1].apply(rows, parties[1].signal(sum(p.contribution(rows) for p in parties), y))
    assert np.abs(before - parties[1].weights - numeric).max() < 1e-8


@pytest.mark.parametrize(("name", "lr", "epochs", "gap"), [("afsvrg", 0.1, 14, 1e-5), ("afsaga", 0.03, 16, 1e-4)])
def test_asynchronous_masked_runs_lose_nothing(run, name, lr, epochs, gap):
    job, _ = run(method={"name": name}, security__mode="pairwise", train__lr=lr, train__epochs=epochs)
    assert objective(job) - BC3 < gap
    assert auc(sum(m.contribution() for m in job.methods.values()), job.data.y) == pytest.approx(0.99670, abs=1e-3)


def test_sgd_stays_on_a_plateau_where_variance_reduction_does_not(run):
    sgd, _ = run(method={"name": "central", "estimator": "sgd"}, train__epochs=30)
    svrg, _ = run(method={"name": "central", "estimator": "svrg"}, train__epochs=30)
    saga, _ = run(method={"name": "central", "estimator": "saga"}, train__epochs=30)
    assert objective(sgd) - BC3 > 1e-4
    assert objective(svrg) - BC3 < 1e-6
    assert objective(saga) - BC3 < 1e-6


def test_sgd_plateau_is_proportional_to_the_step(run):
    means = []
    for lr in (0.06, 0.03, 0.015):
        gaps = []

        def watch(job, gaps=gaps):
            if job.net.steps > 20 * 569 and job.net.steps % 1707 == 0:
                gaps.append(objective(job) - BC3)

        for seed in (0, 1):
            run(watch, method={"name": "central"}, train__epochs=32, train__lr=lr, seed=seed)
        means.append(np.mean(gaps))
    assert 1.4 < means[0] / means[1] < 3.0
    assert 1.4 < means[1] / means[2] < 3.0


def test_label_modes(run):
    alone, _ = run(method={"name": "afsvrg"}, labels=["mean"], train__epochs=25, train__lr=0.1)
    assert objective(alone) == pytest.approx(0.18337299, abs=2e-4)
    assert np.abs(weights(alone)[10:]).max() == 0.0
    dominator, _ = run(method={"name": "vfb2", "estimator": "svrg"}, labels=["mean"], train__epochs=14, train__lr=0.1)
    assert objective(dominator) == pytest.approx(BC3, abs=1e-5)


def test_several_dominators(run):
    job, _ = run(
        method={"name": "vfb2", "estimator": "svrg", "snapshot": "rolling"}, labels=["mean", "worst"], train__epochs=10, train__lr=0.05
    )
    assert objective(job) - BC3 < 1e-4


def test_ks_and_auc_by_hand():
    scores, y = np.array([0.1, 0.2, 0.2, 0.9]), np.array([-1.0, 1.0, -1.0, 1.0])
    assert auc(scores, y) == pytest.approx(0.875)
    assert ks(scores, y) == pytest.approx(0.5)
