"""The rotation codec's own numbers and edges."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import D, draw, draws_of, make

import xutrain


@pytest.mark.parametrize(("s", "expected"), [(2, 0.571), (3, 0.234), (5, 0.087), (9, 0.0286)])
def test_eden_does_not_see_the_distribution(s: int, expected: float) -> None:
    codec = make("eden", levels=s)
    for kind in ("gauss", "laplace", "t3"):
        v = draw(kind, 8 * D)
        assert codec.expected_error(v, draws=4) / float(v.square().sum()) == pytest.approx(expected, rel=0.04), kind


def test_eden_is_unbiased_over_rotations() -> None:
    codec, v, n = make("eden", levels=3), draw("t3", D), 400
    mean = draws_of(codec, v, n).mean(0)
    norm = float(v.double().square().sum())
    assert float((mean - v).square().sum()) / norm == pytest.approx(0.234 / n, rel=0.25)  # all of it variance


def test_eden_edges() -> None:
    for s in (2, 3, 5, 9):
        codec = make("eden", levels=s, bucket=64)
        for at in (0, 17, 63):
            hot = torch.zeros(64)
            hot[at] = -3.0
            assert torch.allclose(codec.decode(codec.encode(hot, xutrain.key(at))), hot, atol=1e-6)
        assert torch.equal(codec.decode(codec.encode(torch.zeros(100), xutrain.key(0))), torch.zeros(100))
        huge = torch.tensor([3e38, -3e38, 1e38, 0.0])
        assert bool(torch.isfinite(codec.decode(codec.encode(huge, xutrain.key(0)))).all())
    v = draw("gauss", 100)
    a, b = (make("eden", bucket=64).encode(v, xutrain.key(worker=w)).data for w in (0, 1))
    assert not torch.equal(a[:8], b[:8])  # the rotation travels with the message


def test_least_squares_scale_is_contractive() -> None:
    v = draw("t3", D)
    plain, shrunk = make("eden", levels=2), make("eden", levels=2, scale="least_squares")
    assert shrunk.expected_error(v, 4) / float(v.square().sum()) == pytest.approx(1 - 2 / math.pi, rel=0.03)
    assert shrunk.expected_error(v, 4) < plain.expected_error(v, 4) and shrunk.contractive and shrunk.biased
