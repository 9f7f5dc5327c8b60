"""Unbiasedness, relative errors, averaging, contraction: what the codecs do to random vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from codec_cases import ALL, D, draw, draws_of, make, named, relative

import xutrain

# --- 2. unbiasedness


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("orq", {"levels": 3}),
        ("orq", {"levels": 9}),
        ("orq", {"levels": 6, "refine": 4}),
        ("terngrad", {}),
        ("qsgd", {"levels": 5}),
        ("qsgd", {"levels": 3, "norm": "l2"}),
        ("linear", {"levels": 5}),
        ("quantile", {"levels": 5}),
    ],
    ids=str,
)
def test_mean_of_many_draws(name: str, options: dict[str, Any]) -> None:
    codec, v, n = make(name, bucket=16, **options), draw("t3", 48), 4000
    assert not codec.biased
    out = draws_of(codec, v, n)
    levels = codec.levels(v).double()
    cell = [
        (max(b for b in r if b <= x), min(b for b in r if b >= x))
        for x, r in zip(v.tolist(), levels.repeat_interleave(16, 0).tolist(), strict=True)
    ]
    variance = torch.tensor([(high - x) * (x - low) for x, (low, high) in zip(v.tolist(), cell, strict=True)], dtype=torch.float64)
    assert bool(((out.mean(0) - v).abs() <= 5 * (variance / n).sqrt() + 1e-6 * v.abs()).all())
    assert float((out - v).square().mean(0).sum()) == pytest.approx(codec.expected_error(v), rel=0.05)
    assert float(variance.sum()) == pytest.approx(codec.expected_error(v))


@pytest.mark.parametrize(("name", "options"), [("qsgd", {"norm": "l2"}), ("qsgd", {}), ("terngrad", {}), ("k_orq", {"levels": 4})], ids=str)
def test_what_is_clipped_is_in_the_expected_error(name: str, options: dict[str, Any]) -> None:
    codec, v = make(name, bucket=16, clip=1.0, **options), draw("t3", 48)
    error = (draws_of(codec, v, 400) - v).square().mean(0).sum()
    assert float(error) == pytest.approx(codec.expected_error(v), rel=0.1)


def test_bingrad_pb_is_unbiased_inside_only() -> None:
    codec, v, n = make("bingrad_pb", bucket=64), draw("gauss", 64), 4000
    b = float(codec.levels(v)[0, 1])
    mean = draws_of(codec, v, n).mean(0)
    inside = v.abs() <= b
    assert bool(((mean - v).abs()[inside] <= 5 * b / math.sqrt(n)).all())
    assert bool((mean[~inside].abs() == b).all()) and int(inside.sum()) not in (0, 64)
    assert codec.biased and codec.contractive


# --- 8. the table of relative errors, d = 2048, mean of 20 draws

TABLE: list[tuple[str, dict[str, Any], tuple[float, float, float]]] = [
    ("orq", {"levels": 3}, (1.79, 2.68, 4.78)),
    ("terngrad", {}, (1.89, 2.97, 6.67)),
    ("linear", {"levels": 3}, (1.81, 3.32, 16.7)),
    ("quantile", {"levels": 3}, (1.80, 2.70, 5.20)),
    ("qsgd", {"levels": 3, "norm": "l2"}, (35.1, 30.9, 28.6)),
    ("terngrad", {"clip": 2.5}, (1.01, 0.88, 0.97)),
    ("orq", {"levels": 5}, (0.348, 0.497, 0.694)),
    ("qsgd", {"levels": 5}, (0.549, 1.07, 2.92)),
    ("linear", {"levels": 5}, (0.515, 1.10, 3.52)),
    ("quantile", {"levels": 5}, (0.587, 1.20, 2.33)),
    ("orq", {"levels": 9}, (0.0785, 0.112, 0.146)),
    ("qsgd", {"levels": 9}, (0.138, 0.319, 1.14)),
    ("linear", {"levels": 9}, (0.129, 0.290, 1.10)),
    ("quantile", {"levels": 9}, (0.205, 0.521, 1.18)),
    ("bingrad_b", {}, (0.364, 0.503, 0.572)),
    ("bingrad_b", {"threshold": "lloyd"}, (0.364, 0.501, 0.571)),
    ("scaled_sign", {}, (0.364, 0.503, 0.572)),
    ("bingrad_pb", {}, (0.455, 0.581, 0.640)),
    ("pb_orq", {"levels": 3}, (0.267, 0.356, None)),
    ("pb_orq", {"levels": 5}, (0.125, None, None)),
    ("pb_orq", {"levels": 9}, (0.048, None, None)),
]


@pytest.mark.parametrize(("name", "options", "expected"), TABLE, ids=[named(n, o) for n, o, _ in TABLE])
def test_relative_errors(name: str, options: dict[str, Any], expected: tuple[float | None, ...]) -> None:
    codec = make(name, **options)
    for kind, value, tolerance in zip(("gauss", "laplace", "t3"), expected, (0.08, 0.12, 0.5), strict=True):
        if value is not None:
            measured = np.mean([relative(codec, draw(kind, D, seed)) for seed in range(20)])
            assert measured == pytest.approx(value, rel=tolerance), kind


def test_orq_is_ahead_at_equal_levels() -> None:
    draws = [draw("gauss", D, seed) for seed in range(20)]
    for s, bound in ((5, 0.75), (9, 0.70)):
        orq, qsgd, linear = (np.mean([relative(make(n, levels=s), v) for v in draws]) for n in ("orq", "qsgd", "linear"))
        assert orq <= bound * min(qsgd, linear)


# --- 10. averaging


@pytest.mark.parametrize(("name", "options"), [("orq", {"levels": 3}), ("terngrad", {}), ("linear", {"levels": 5})], ids=str)
def test_mean_of_workers(name: str, options: dict[str, Any]) -> None:
    codec, v, workers = make(name, **options), draw("gauss", D), 8
    many = v.repeat(200)  # 200 independent draws at once
    out = [codec.decode(codec.encode(many, xutrain.key(worker=w))) for w in range(workers)]
    single, together = float((out[0] - many).square().sum()), float((torch.stack(out).mean(0) - many).square().sum())
    assert together == pytest.approx(single / workers, rel=0.1)
    assert single / 200 == pytest.approx(codec.expected_error(v), rel=0.05)
    assert torch.equal(codec.decode(codec.encode(many, xutrain.key(worker=0))), out[0])  # identical keys: nothing to average


# --- contraction


@pytest.mark.parametrize(("name", "options"), ALL, ids=[named(n, o) for n, o in ALL])
def test_contractive_codecs_shrink_every_vector(name: str, options: dict[str, Any]) -> None:
    codec = make(name, **options)
    if not codec.contractive:
        return
    rng = np.random.default_rng(3)
    vectors = [draw(kind, n, n) for kind in ("gauss", "laplace", "t3") for n in (1, 2, 3, 10, 500)]
    vectors += [draw("gauss", 50) + 100, torch.tensor([0.0] * 99 + [1.0]), torch.tensor([1.0] * 50 + [-1.0] * 50), torch.full((7,), 1e-9)]
    vectors += [torch.tensor([1.0, 1e-6]), torch.tensor([5.0, 5.1, 0.0, 0.0]), torch.from_numpy(10.0 ** rng.uniform(-6, 3, 300)).float()]
    for v in vectors:
        expected = codec.expected_error(v) if hasattr(codec, "expected_error") else None
        if expected is None:
            expected = float((codec.decode(codec.encode(v, xutrain.key())) - v).double().square().sum())
        assert expected < float(v.double().square().sum()), v[:8]


def test_orq3_and_terngrad_are_not_contractive() -> None:
    v = draw("gauss", D)
    for codec in (make("orq", levels=3), make("terngrad"), make("qsgd", levels=3)):
        assert not codec.contractive and relative(codec, v) > 1
    assert not make("k_orq", effective_workers=64).contractive
    assert not make("bingrad_b", clip=2.5).contractive and make("orq", clip=2.5).biased
