"""Levels and errors against closed forms, a dynamic programme and known constants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from codec_cases import WORKED, D, draw, error, make, optimal

import xutrain

# --- 1. worked example


def test_worked_example() -> None:
    orq3, orq5 = make("orq", levels=3), make("orq", levels=5)
    assert orq3.levels(WORKED).tolist() == [[-4, 0.5, 8]] and orq3.expected_error(WORKED) == 23.5
    assert orq5.levels(WORKED).tolist() == [[-4, -1, 0.5, 2, 8]] and orq5.expected_error(WORKED) == 1.0
    for s in (3, 5):
        assert optimal(WORKED.numpy(), s)[0] == pytest.approx(make("orq", levels=s).expected_error(WORKED))
    assert make("bingrad_pb").levels(WORKED).tolist() == [[-1.75, 1.75]]
    assert make("bingrad_b").levels(WORKED)[0].tolist() == pytest.approx([-1.1, 11 / 3])
    assert make("bingrad_b", threshold="lloyd").levels(WORKED)[0].tolist() == pytest.approx([-5 / 14, 8])
    assert make("terngrad").levels(WORKED).tolist() == [[-8, 0, 8]]
    assert make("scaled_sign").levels(WORKED).tolist() == [[-2.1875, 2.1875]]
    assert make("linear", levels=5).levels(WORKED).tolist() == [[-4, -1, 2, 5, 8]]
    assert make("qsgd", levels=5).levels(WORKED).tolist() == [[-8, -4, 0, 4, 8]]
    assert make("onebit").levels(WORKED)[0].tolist() == pytest.approx([-2, 2.3])


@pytest.mark.parametrize("s", [3, 5, 9])
def test_greedy_against_the_dynamic_programme(s: int) -> None:
    """Exact with three levels; within a few percent beyond, and refinement only helps."""
    ratios = []
    for seed in range(5):
        v = draw("laplace", 96, seed)
        best, _ = optimal(v.numpy(), s)
        found, refined = make("orq", levels=s).expected_error(v), make("orq", levels=s, refine=20).expected_error(v)
        assert refined <= found * (1 + 1e-9) and refined >= best * (1 - 1e-6)
        ratios.append(found / best)
    assert np.mean(ratios) <= {3: 1 + 1e-6, 5: 1.03, 9: 1.08}[s]


# --- 3. one-sided slopes


def slopes(x: np.ndarray, low: float, mid: float, high: float) -> tuple[float, float, float]:
    """One-sided derivatives of the error at the inner level, and a rounding slack."""
    inside = x[(x >= low) & (x <= high)]
    area, width, m = (inside - low).sum(), high - low, len(inside)
    at_most, below = (inside <= mid).sum(), (inside < mid).sum()
    return area - (m - below) * width, area - (m - at_most) * width, 1e-9 * width * m


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t3"])
@pytest.mark.parametrize("s", [3, 5, 9, 17])
def test_slopes_bracket_zero(s: int, kind: str) -> None:
    v = draw(kind, 512)
    x = v.double().numpy()
    found = make("orq", levels=s).levels(v)[0].double().tolist()
    step = s - 1
    while step > 1:  # as they were set: between the levels of the step before
        for left in range(0, s - 1, step):
            down, up, slack = slopes(x, found[left], found[left + step // 2], found[left + step])
            assert down <= slack and up >= -slack
        step //= 2
    refined = make("orq", levels=s, refine=64).levels(v)[0].double().tolist()
    for k in range(1, s - 1):  # at all levels at once
        down, up, slack = slopes(x, *refined[k - 1 : k + 2])
        assert down <= slack and up >= -slack


# --- 5. uniform data


def test_uniform_data_gives_even_levels() -> None:
    v = torch.linspace(-1, 1, 1 << 16)
    for s in (3, 5, 9):
        orq, linear = make("orq", levels=s, bucket=1 << 16), make("linear", levels=s, bucket=1 << 16)
        assert orq.levels(v)[0].tolist() == pytest.approx(torch.linspace(-1, 1, s).tolist(), abs=1e-3)
        width = 2 / (s - 1)
        assert orq.expected_error(v) / len(v) == pytest.approx(width**2 / 6, rel=1e-3)
        assert orq.expected_error(v) == pytest.approx(linear.expected_error(v), rel=1e-3)


# --- 7. constants


def test_bingrad_constants() -> None:
    rng = np.random.default_rng(0)
    n = 1_000_000
    for values, b, e in [
        (rng.standard_normal(n), 0.64714, 0.4539),
        (rng.laplace(size=n), 0.80647, None),
        (rng.uniform(-1, 1, n), math.sqrt(2) - 1, None),
    ]:
        v = torch.from_numpy(values.astype(np.float32))
        codec = make("bingrad_pb", bucket=n)
        assert float(codec.levels(v)[0, 1]) == pytest.approx(b, rel=0.01)
        if e is not None:
            assert codec.expected_error(v) / n == pytest.approx(e, rel=0.01)
    v = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    codec = make("bingrad_b", bucket=n)
    assert codec.levels(v)[0].tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], rel=0.01)
    assert codec.expected_error(v) / n == pytest.approx(1 - 2 / math.pi, rel=0.01)


# --- free outer levels


def test_bias_and_variance_split() -> None:
    v = draw("gauss", D)
    bias, variance = make("orq", levels=3).bias_and_variance(v)
    assert bias == 0 and variance > 0
    bias, variance = make("pb_orq", levels=3).bias_and_variance(v)
    assert bias > 0 and variance > 0
    bias, variance = make("bingrad_b").bias_and_variance(v)
    assert bias > 0 and variance == 0


def test_k_aware_levels_lie_between() -> None:
    """K = 1 is pb-ORQ, an infinite K is ORQ after refinement; the objective of each is least at its own levels."""
    v = draw("laplace", D)
    one, many = make("k_orq", levels=5, effective_workers=1), make("k_orq", levels=5, effective_workers=1e30, sweeps=200)
    assert torch.equal(one.levels(v), make("pb_orq", levels=5).levels(v))
    assert many.levels(v)[0, 0] == v.min() and many.levels(v)[0, -1] == v.max()
    assert many.expected_error(v) == pytest.approx(make("orq", levels=5, refine=64).expected_error(v), rel=0.02)
    assert torch.equal(xutrain.codec("k_orq", workers=16).levels(v), make("k_orq", effective_workers=16).levels(v))
    parts = {k: make("k_orq", levels=3, effective_workers=k).bias_and_variance(v) for k in (1, 4, 16, 64)}
    for k, j in itertools.permutations(parts, 2):
        assert parts[k][0] + parts[k][1] / k <= (parts[j][0] + parts[j][1] / k) * (1 + 1e-6)


def test_pb_orq_with_two_levels_is_bingrad_pb_with_free_levels() -> None:
    v = draw("laplace", D) + 0.3
    assert torch.allclose(make("pb_orq", levels=2).levels(v), make("bingrad_pb", symmetric=False).levels(v), rtol=1e-4)
    assert make("bingrad_pb", symmetric=False).expected_error(v) <= make("bingrad_pb").expected_error(v)


def test_one_bit_orderings() -> None:
    for kind, seed in itertools.product(("gauss", "laplace", "t3"), range(5)):
        v = draw(kind, D, seed)
        lloyd, mean = make("bingrad_b", threshold="lloyd").expected_error(v), make("bingrad_b").expected_error(v)
        assert lloyd <= mean * (1 + 1e-9)


def test_expected_error_against_a_plain_loop() -> None:
    v = draw("t3", 200)
    for codec in (make("orq", levels=9), make("terngrad", clip=2.5), make("pb_orq", levels=4), make("linear", level_dtype="bf16")):
        assert codec.expected_error(v) == pytest.approx(error(v.numpy(), codec.levels(v)[0].double().numpy()), rel=1e-5)
