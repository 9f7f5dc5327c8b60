"""Laws that every partition keeps, and the published figures of the data-similarity rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xutrain.data.partition import Samples, deal, distance, table
from xutrain.engine.rng import Key
from xutrain.errors import RecipeError
from xutrain.registry import load

CIFAR = np.repeat(np.arange(10), 5000)


def dealt(
    name: str, labels: np.ndarray, clients: int, seed: int = 0, sites: np.ndarray | None = None, **options: float
) -> list[np.ndarray]:
    rule = load("partition", name)
    chosen = rule.Options(name=name, **options)
    return deal(rule, chosen, Samples(len(labels), labels, sites), clients, int(labels.max()) + 1, Key(seed, "partition").numpy())


def test_similarity_has_the_published_distances() -> None:  # T12
    means = []
    for s, expected in ((0.0, 0.850), (0.05, 0.806), (0.1, 0.764), (0.2, 0.680), (1.0, 0.021)):
        parts = dealt("similarity", CIFAR, 16, s=s)
        counts = table(parts, CIFAR, 10)
        means.append(float(distance(counts).mean()))
        assert means[-1] == pytest.approx(expected, abs=0.008)
        assert {len(p) for p in parts} <= {3124, 3125, 3126}
        if s == 0.0:
            assert int((counts > 0).sum(axis=1).max()) <= 2
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(2, 6),
    st.integers(40, 200),
    st.sampled_from(["similarity", "iid", "shards", "dirichlet", "classes"]),
    st.integers(0, 10**6),
    st.floats(0, 1),
)
def test_every_index_is_dealt_once(clients: int, kinds: int, n: int, name: str, seed: int, s: float) -> None:
    labels = np.random.default_rng(seed).permutation(np.arange(n) % kinds)
    options: dict = {"similarity": {"s": s}, "dirichlet": {"alpha": 1.0, "min_size": 1}}.get(name, {})
    if name == "classes" and clients * 2 < kinds:
        return
    parts = dealt(name, labels, clients, seed, **options)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    if name in ("similarity", "iid"):
        sizes = [len(p) for p in parts]
        assert max(sizes) - min(sizes) <= 2
    again = dealt(name, labels, clients, seed, **options)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_equal_labels_keep_the_permuted_order() -> None:
    rng = Key(3, "partition").numpy()
    order = rng.permutation(100)
    parts = dealt("similarity", np.zeros(100, dtype=np.int64), 4, seed=3, s=0.2)
    expected = [np.concatenate(p) for p in zip(np.array_split(order[:20], 4), np.array_split(order[20:], 4), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(parts, expected, strict=True))


def test_dirichlet_respects_the_smallest_size_and_its_concentration() -> None:
    skewed = dealt("dirichlet", CIFAR, 8, alpha=0.1)
    flat = dealt("dirichlet", CIFAR, 8, alpha=1000.0)
    assert min(map(len, skewed)) >= 10
    assert distance(table(skewed, CIFAR, 10)).mean() > 0.5
    assert distance(table(flat, CIFAR, 10)).mean() < 0.15  # full clients are passed over, so the last classes are never flat


def test_shards_and_classes_bound_the_classes_of_a_client() -> None:
    counts = table(dealt("shards", CIFAR, 10, per_client=2), CIFAR, 10)
    assert int((counts > 0).sum(axis=1).max()) <= 2
    counts = table(dealt("classes", CIFAR, 10, per_client=3), CIFAR, 10)
    assert set((counts > 0).sum(axis=1).tolist()) == {3}


def test_sites_are_clients() -> None:
    sites = np.array([5, 1, 1, 3, 5, 5])
    parts = dealt("by_site", np.zeros(6, dtype=np.int64), 3, sites=sites)
    assert [p.tolist() for p in parts] == [[1, 2], [3], [0, 4, 5]]


@pytest.mark.parametrize(
    ("name", "samples", "clients", "options", "where", "word"),
    [
        ("iid", 100, 101, {}, "clients.count", "more clients than"),
        ("classes", 100, 2, {"per_client": 2}, "partition", "class 4, 5"),
        ("dirichlet", 100, 20, {"min_size": 10}, "partition.min_size", "cannot have"),
        ("dirichlet", 100, 9, {"alpha": 0.001, "attempts": 3}, "partition.alpha", "draws"),
        ("classes", 100, 4, {"per_client": 9}, "partition.per_client", "6 classes"),
        ("by_site", 100, 4, {}, "partition.name", "no sites"),
        ("shards", 61, 61, {"per_client": 2}, "partition.per_client", "more shards than 61 samples"),
        ("shards", 100, 3, {"per_client": 10**9}, "partition.per_client", "at most 33"),
    ],
)
def test_partitions_that_cannot_be_are_named(name: str, samples: int, clients: int, options: dict, where: str, word: str) -> None:
    labels = np.arange(samples) % 6
    with pytest.raises(RecipeError) as caught:
        dealt(name, labels, clients, **options)
    assert caught.value.issues[0].where == where
    assert word in str(caught.value)


def test_sites_must_match_the_number_of_clients() -> None:
    with pytest.raises(RecipeError, match="has 3 sites"):
        dealt("by_site", np.zeros(6, dtype=np.int64), 4, sites=np.array([5, 1, 1, 3, 5, 5]))


def test_similarity_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        load("partition", "similarity").Options(s=1.2)
