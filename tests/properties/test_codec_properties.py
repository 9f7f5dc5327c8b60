"""Laws that hold for every vector: the theorem on three levels, invariances, round trips."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xutrain

#: zero, or large enough that levels and products with 24-bit uniforms stay normal numbers
FINITE = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-25 else 0.0)
#: few distinct values, so that ties at levels are common, or arbitrary ones
VECTORS = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 60), elements=FINITE),
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([-4.0, -1.0, 0.0, 0.5, 1.0, 1.0, 7.0])),
).map(torch.from_numpy)
#: the same examples in every run
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def make(name: str, **options: Any) -> Any:
    return xutrain.codec(name, **options)


def slack(v: torch.Tensor) -> float:
    return 1e-5 * float(v.double().square().sum()) + 1e-30


@FEW
@given(VECTORS)
def test_three_levels_are_never_worse(v: torch.Tensor) -> None:
    """error(ORQ-3) <= error(TernGrad) = error(QSGD-max-3), and <= Linear-3 and quantile-3, for any vector."""
    best = make("orq", levels=3).expected_error(v)
    tern, qsgd = make("terngrad").expected_error(v), make("qsgd", levels=3).expected_error(v)
    assert tern == qsgd
    for other in (tern, make("linear", levels=3).expected_error(v), make("quantile", levels=3).expected_error(v)):
        assert best <= other + slack(v)


@FEW
@given(VECTORS, st.sampled_from([5, 9]))
def test_more_levels_and_refinement_never_hurt(v: torch.Tensor, s: int) -> None:
    coarse, fine = make("orq", levels=(s + 1) // 2).expected_error(v), make("orq", levels=s).expected_error(v)
    assert fine <= coarse + slack(v)
    assert make("orq", levels=s, refine=4).expected_error(v) <= fine + slack(v)


@FEW
@given(VECTORS, st.sampled_from([0.25, 2.0, 64.0]), st.randoms())
def test_invariances(v: torch.Tensor, a: float, shuffle: Any) -> None:
    order = list(range(len(v)))
    shuffle.shuffle(order)
    for codec in (make("orq", levels=5), make("bingrad_b"), make("bingrad_b", threshold="lloyd"), make("bingrad_pb"), make("quantile")):
        levels = codec.levels(v)
        assert torch.allclose(codec.levels(v * a), levels * a, rtol=1e-6, atol=0)  # scaling by a power of two is exact
        assert torch.allclose(codec.levels(v[order]), levels, rtol=1e-5, atol=1e-7 * float(v.abs().max()))
    orq = make("orq", levels=3)  # with more levels, which of two equally good ones is taken changes those below it
    assert abs(orq.expected_error(-v) - orq.expected_error(v)) <= slack(v)
    assert torch.equal(make("bingrad_pb").levels(-v), make("bingrad_pb").levels(v))


@FEW
@given(hnp.arrays(np.int32, st.integers(1, 60), elements=st.integers(-1000, 1000)), st.integers(-500, 500))
def test_shift(values: np.ndarray, c: int) -> None:
    """levels(v + c) = levels(v) + c, on integers where the addition is exact."""
    v = torch.from_numpy(values).float()
    assert torch.equal(make("orq", levels=3).levels(v + c), make("orq", levels=3).levels(v) + c)
    assert torch.allclose(make("bingrad_b").levels(v + c), make("bingrad_b").levels(v) + c, atol=1e-3)
    assert abs(make("orq", levels=3).expected_error(-v) - make("orq", levels=3).expected_error(v)) <= slack(v)


@FEW
@given(VECTORS)
def test_partially_biased_condition(v: torch.Tensor) -> None:
    """|sum over |v| > b of |v| - n b| <= b #{|v| = b}, equation (C4)."""
    b = float(make("bingrad_pb").levels(v)[0, 1])
    magnitude = v.double().abs().numpy()
    near = np.isclose(magnitude, b, rtol=1e-6, atol=0)
    outside = magnitude[(magnitude > b) & ~near].sum()
    assert outside - 1e-6 * len(v) * b - 1e-30 <= len(v) * b <= outside + magnitude[near].sum() + 1e-6 * len(v) * b + 1e-30


@FEW
@given(VECTORS, st.integers(1, 70), st.integers(0, 1000))
def test_decoded_values_are_neighbouring_levels(v: torch.Tensor, bucket: int, seed: int) -> None:
    for name, options in (("orq", {"levels": 9}), ("linear", {"levels": 4}), ("terngrad", {}), ("k_orq", {"levels": 4})):
        codec = make(name, bucket=bucket, **options)
        out = codec.decode(codec.encode(v, xutrain.key(seed)))
        levels = codec.levels(v)
        for i, (x, y) in enumerate(zip(v.tolist(), out.tolist(), strict=True)):
            row = levels[i // bucket].tolist()
            w = min(max(x, row[0]), row[-1])
            assert y in (max(b for b in row if b <= w), min(b for b in row if b >= w))


@settings(FEW, max_examples=40)
@given(VECTORS)
def test_contractive_on_any_vector(v: torch.Tensor) -> None:
    norm = float(v.double().square().sum())
    if norm < 1e-20:
        return
    for name, options in (("bingrad_pb", {}), ("bingrad_pb", {"symmetric": False}), ("bingrad_b", {}), ("onebit", {}), ("scaled_sign", {})):
        assert make(name, **options).expected_error(v) < norm
    for s in (2, 3, 5):
        assert make("pb_orq", levels=s).expected_error(v) < norm
