"""Masks and trees: exactness, uniformity, the rank audit, and what leaks all the same (T7, T8, T11, section on security)."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from tests.vertical.conftest import recipe_of, run_through
from tests.vertical.vertical_sums import objective
from xutrain.errors import Diverged, RecipeError, UsageError
from xutrain.launch.parties import audit
from xutrain.methods.vertical import attacks
from xutrain.methods.vertical.plan import load_data
from xutrain.methods.vertical.security import SafeSum, fixed, pairwise, trees


@pytest.mark.parametrize("mode", ["tree", "pairwise"])
@pytest.mark.parametrize("parties", [3, 4, 5, 7, 8])
def test_masked_sums_are_exact_within_the_bound(mode, parties):
    rng = np.random.default_rng(0)
    safe = SafeSum(mode, parties, 3)
    for requester in range(parties):
        values = [rng.standard_normal(50) for _ in range(parties)]
        total = safe.combine([safe.send(p, values[p], requester, 17) for p in range(parties)], (50,))
        assert np.abs(total - sum(values)).max() <= parties * 2.0**-33


@pytest.mark.parametrize("mode", ["tree", "pairwise"])
def test_masked_runs_equal_plain_runs(run, mode):
    plain, _ = run(method={"name": "afsvrg", "snapshot": "barrier"}, train__mode="sync", train__epochs=2)
    masked, _ = run(method={"name": "afsvrg", "snapshot": "barrier"}, train__mode="sync", train__epochs=2, security={"mode": mode})
    assert abs(objective(masked) - objective(plain)) < 1e-8


@pytest.mark.parametrize("make", [pairwise.chacha, pairwise.philox])
def test_what_a_responder_sends_is_uniform_and_uncorrelated(make):
    key = pairwise.simulated_key(0, 1, 2)
    one, two = pairwise.Pairwise(1, {2: make(key)}), pairwise.Pairwise(2, {1: make(key)})
    z = np.linspace(-3, 3, 40_000)
    sent = fixed.encode(z, 3) + one.mask(0, 5, [1, 2], len(z))
    counts = np.bincount((sent >> np.uint64(56)).astype(int), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 350  # chi^2 with 255 degrees: 350 is beyond 1 in 10,000
    assert abs(np.corrcoef(sent.astype(float), z)[0, 1]) < 0.02
    assert np.array_equal(one.mask(0, 5, [1, 2], 9) + two.mask(0, 5, [1, 2], 9), np.zeros(9, dtype=np.uint64))
    assert not np.array_equal(one.mask(0, 5, [1, 2], 9), one.mask(0, 6, [1, 2], 9))
    assert not np.array_equal(one.mask(0, 5, [1, 2], 9), one.mask(1, 5, [1, 2], 9))
    assert not one.mask(0, 5, [1], 9).any()  # a single responder has nobody to hide with


def test_agreed_keys_are_equal_and_bound_to_the_run():
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519")
    a, b = x25519.X25519PrivateKey.generate(), x25519.X25519PrivateKey.generate()
    publics = [k.public_key().public_bytes_raw() for k in (a, b)]
    key = pairwise.agreed_key(a.private_bytes_raw(), publics[1], "run")
    assert key == pairwise.agreed_key(b.private_bytes_raw(), publics[0], "run")
    assert key != pairwise.agreed_key(b.private_bytes_raw(), publics[0], "another")


@pytest.mark.parametrize("value", [2.0**30, -(2.0**31), np.nan, np.inf])
def test_a_product_out_of_range_is_an_error_never_a_wrap(value):
    with pytest.raises(Diverged, match="range"):
        fixed.encode(np.array([1.0, value]), 3)


def test_masks_without_cryptography_give_the_same_totals(monkeypatch):
    values = [np.array([0.25, -3.5]), np.array([1.0, 2.0]), np.array([7.0, 0.1])]

    def total() -> np.ndarray:
        safe = SafeSum("pairwise", 3)
        return safe.combine([safe.send(p, v, 0, 1) for p, v in enumerate(values)], (2,))

    first = total()
    monkeypatch.setattr("xutrain.methods.vertical.security.has_cryptography", lambda: False)
    assert np.array_equal(total(), first)


def test_identical_trees_and_stars_leak_to_one_party():
    for q in (3, 4, 5, 8):
        for parents in (trees.chain(q), trees.star(q)):
            assert len(trees.smallest_breaking(parents, parents)) == 1
        with pytest.raises(RecipeError, match="alone learns"):
            trees.pair("same_star", q)
    assert sum(trees.leak(trees.chain(3), trees.chain(3), [p]) > 0 for p in range(3)) == 1
    assert trees.smallest_breaking(trees.star(4), trees.star(4, 1)) == (0, 1)
    assert trees.leak([-1, 0, 0, 2], trees.star(4), [0]) > 0  # "totally different", and yet


@pytest.mark.parametrize(("q", "leaking", "of"), [(3, 2, 2), (4, 2, 6), (5, 24, 24), (6, 56, 120)])
def test_binomial_trees_with_one_root(q, leaking, of):
    orders = list(permutations(range(1, q)))
    found = sum(any(trees.leak(trees.binomial(list(range(q))), trees.binomial([0, *order]), [p]) > 0 for p in range(q)) for order in orders)
    assert (found, len(orders)) == (leaking, of)
    if q in (3, 5):
        with pytest.raises(RecipeError, match="alone learns"):
            trees.pair("binomial", q)


@pytest.mark.parametrize(("q", "pairs"), [(3, 0), (4, 2), (5, 5), (6, 9), (7, 14), (9, 27)])
def test_chain_and_reversed_chain(q, pairs):
    t1, t2 = trees.chain(q), trees.reversed_chain(q)
    assert not any(trees.leak(t1, t2, [p]) for p in range(q))
    assert sum(trees.leak(t1, t2, c) > 0 for c in combinations(range(q), 2)) == pairs


@pytest.mark.parametrize(("q", "size"), [(4, None), (5, 3), (6, 3), (8, 3)])
def test_known_pairs(q, size):
    pair = trees.pair("auto", q)
    assert (None if pair.breaking is None else len(pair.breaking)) == size


@pytest.mark.parametrize("parents", [[-1, -1, 0], [1, 2, 0], [-1, 5, 0], [0, 0, 0]])
def test_lists_that_are_no_trees_are_refused(parents):
    with pytest.raises(RecipeError):
        trees.pair("given", 3, parents, trees.chain(3))


def test_recipes_with_leaking_trees_or_too_many_totals_are_refused():
    with pytest.raises(RecipeError, match="alone learns"):
        recipe_of(security={"mode": "tree", "trees": "binomial"})
    with pytest.raises(RecipeError, match="cannot hide"):
        recipe_of(data={"name": "breast_cancer", "parties": 2}, security={"mode": "tree"})
    from xutrain.loops.vertical import forecast

    with pytest.raises(RecipeError, match="totals per sample"):
        forecast(recipe_of(train__epochs=12, security={"mode": "pairwise", "totals_limit": 9}))


def test_totals_give_the_other_features_away():
    recipe = recipe_of(
        data={"name": "breast_cancer", "parties": 2}, method={"name": "vfb2", "estimator": "svrg"}, labels=["party0"], train__lr=0.1
    )
    found = dict(audit(recipe, "totals", 20)["rows"])
    assert found[15] < 1e-6
    assert found[4] > 0.5


def test_softmax_totals_give_them_away_sooner():
    """A softmax total holds several numbers, so fewer passes are needed than the others have columns."""
    raw = {"data": {"name": "digit_quadrants"}, "labels": ["top_left"], "loss": "softmax", "method": {"name": "vfb2"}}
    recipe = recipe_of(**raw, train__lr=0.2, train__batch_size=16)
    found = dict(audit(recipe, "totals", 300)["rows"])
    assert max(found) < 16  # 48 columns
    assert found[max(found)] < 0.3 * found[1]


def test_there_is_nothing_to_audit_in_one_party_or_in_predictions():
    with pytest.raises(UsageError, match="nobody to learn from"):
        audit(recipe_of(method={"name": "central"}), "totals", 0)
    fdml = recipe_of(method={"name": "fdml"}, data={"name": "digit_quadrants"}, loss="softmax", train__mode="sync")
    with pytest.raises(UsageError, match="no products"):
        audit(fdml, "totals", 0)


def test_signals_give_the_labels_away():
    assert audit(recipe_of(), "labels", 0)["labels_read"] == 1.0


def test_audit_of_trees_says_which_are_refused():
    verdicts = {row[0]: row[1] for row in audit(recipe_of(), "trees", 0)["rows"]}
    assert verdicts == {"auto": "accepted", "chain": "accepted", "binomial": "REFUSED", "same_star": "REFUSED"}


def test_blocks_that_never_learn_give_nothing_away():
    """Without backward updating the others' products stay at zero: there is no total to learn from."""
    recipe = recipe_of(data={"name": "breast_cancer", "parties": 2}, labels=["party0"])
    assert {error for _, error in audit(recipe, "totals", 20)["rows"]} == {1.0}


@pytest.mark.parametrize("estimator", ["sgd", "svrg", "saga"])
def test_audited_totals_are_those_of_the_training(estimator):
    """Lock step: the other's products after the last epoch, snapshots and tables as in the run."""
    changes = {"data": {"name": "breast_cancer", "parties": 2}, "method": {"name": "vfb2", "estimator": estimator}, "train__mode": "sync"}
    recipe = recipe_of(**changes, labels=["party0"], train__epochs=3)
    seen = attacks.observed_totals(recipe, load_data(recipe), 0, 3)
    job = run_through(recipe)
    assert np.allclose(seen[:, -1, 0], job.methods[1].contribution(), rtol=0, atol=1e-12)


def test_audit_of_pooled_data_with_named_holders_is_refused_by_name():
    with pytest.raises(UsageError, match="nobody to learn from"):
        audit(recipe_of(method={"name": "central"}, labels=["mean"]), "totals", 0)
