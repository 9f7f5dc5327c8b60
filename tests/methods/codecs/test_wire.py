"""Wire costs, edges, names and options of every codec."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codec_cases import ALL, WIRES, WORKED, draw, draws_of, make, named, wire_bits

import xutrain
from xutrain.engine import rng
from xutrain.errors import RecipeError, UsageError
from xutrain.methods.codecs import eden, rounding
from xutrain.methods.codecs.base import Codec, NonFinite

# --- 9. the wire


@pytest.mark.parametrize(("name", "options", "base", "sent"), WIRES, ids=[named(n, o) for n, o, _, _ in WIRES])
def test_wire_cost_is_the_formula(name: str, options: dict[str, Any], base: int, sent: int) -> None:
    for bucket, dtype, bits in ((16, "fp32", 32), (2048, "fp32", 32), (16, "bf16", 16)):
        codec = make(name, bucket=bucket, level_dtype=dtype, **options)
        for n in (1, 2, 15, 16, 17, 48, 100, 2049):
            payload = codec.encode(draw("gauss", n), xutrain.key())
            assert payload.data.dtype == torch.uint8 and payload.length == n
            assert payload.bits == codec.payload_bits(n) == wire_bits(n, bucket, base, sent, bits)


@pytest.mark.parametrize(("base", "s512", "s2048"), [(3, 1.7875, 1.646875), (5, 2.6458, 2.4115), (9, 3.7625, 3.340625)])
def test_bits_per_element(base: int, s512: float, s2048: float) -> None:
    n = 2048 * 120
    for bucket, expected in ((512, s512), (2048, s2048)):
        assert make("orq", levels=base, bucket=bucket).payload_bits(n) / n == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "options"), ALL, ids=[named(n, o) for n, o in ALL])
def test_every_length_and_twice_the_same(name: str, options: dict[str, Any]) -> None:
    codec = make(name, **options) if name in ("fp", "fp16", "bf16", "signsgd") else make(name, bucket=32, **options)
    for n in (0, 1, 2, 3, 31, 32, 33, 64, 65, 100, 200):
        v = draw("laplace", n, n)
        payload = codec.encode(v, xutrain.key(seed=n))
        assert payload.bits == codec.payload_bits(n)
        out = codec.decode(payload)
        assert out.dtype == torch.float32 and out.shape == v.shape and bool(torch.isfinite(out).all())
        assert torch.equal(out, codec.decode(payload))
        again = make(name, **{k: getattr(codec.options, k) for k in type(codec.options).model_fields if k != "name"})
        assert torch.equal(again.encode(v, xutrain.key(seed=n)).data, payload.data)
        assert torch.equal(again.decode(payload), out)


def test_strided_and_half_vectors() -> None:
    codec, v = make("orq"), draw("gauss", 200)
    assert torch.equal(codec.encode(v[::2], xutrain.key()).data, codec.encode(v[::2].clone(), xutrain.key()).data)
    assert codec.encode(v.bfloat16(), xutrain.key()).length == 200
    with pytest.raises(UsageError, match="one dimension"):
        codec.encode(v.view(10, 20), xutrain.key())


# --- edges


@pytest.mark.parametrize(("name", "options", "base", "sent"), WIRES, ids=[named(n, o) for n, o, _, _ in WIRES])
def test_constant_and_zero_buckets(name: str, options: dict[str, Any], base: int, sent: int) -> None:
    codec = make(name, bucket=8, **options)
    zero = torch.zeros(19)
    assert torch.equal(codec.decode(codec.encode(zero, xutrain.key())), zero)
    if name in ("orq", "bingrad_b", "onebit", "quantile", "linear", "scaled_sign", "pb_orq", "k_orq", "bingrad_pb", "terngrad") or (
        name == "qsgd" and options.get("norm") != "l2"
    ):
        for value in (0.1, -3.7, 1e-30, 1e30):
            same = torch.full((19,), value)
            assert torch.equal(codec.decode(codec.encode(same, xutrain.key())), same)


def test_ties_and_few_distinct_values_are_lossless() -> None:
    v = torch.tensor([0.0, 1.0, 1.0, 1.0, 5.0, 5.0, -2.0] * 9)
    for s in (5, 9, 17):
        out = make("orq", levels=s, bucket=21).decode(make("orq", levels=s, bucket=21).encode(v, xutrain.key()))
        assert s < 9 or torch.equal(out, v)
    assert make("orq", levels=3).expected_error(torch.tensor([0.0, 1.0] * 20)) == 0


def test_huge_and_tiny_values() -> None:
    for scale in (3.4e38, 1e-38):
        v = torch.tensor([1.0, -1.0, 0.5, -0.25, 0.0]) * scale
        for name, options, _, _ in WIRES:
            out = make(name, **options).decode(make(name, **options).encode(v, xutrain.key()))
            assert bool(torch.isfinite(out).all()), name
        levels = make("orq", levels=5).levels(v)
        assert torch.equal(make("orq", levels=5).decode(make("orq", levels=5).encode(v, xutrain.key())), v) and levels[0, -1] == v[0]


@pytest.mark.parametrize(("name", "options"), ALL, ids=[named(n, o) for n, o in ALL])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_names_the_bucket(name: str, options: dict[str, Any], bad: float) -> None:
    v = torch.zeros(5000)
    v[4500] = bad
    with pytest.raises(NonFinite, match=r"bucket [02]: element 4500"):
        make(name, **options).encode(v, xutrain.key())


def test_random_codecs_need_a_key() -> None:
    for name, options in ALL:
        codec = make(name, **options)
        if codec.random:
            with pytest.raises(UsageError, match="needs a key"):
                codec.encode(torch.ones(3))
        else:
            codec.encode(torch.ones(3))


def test_bf16_levels_are_bf16_and_stay_unbiased_inside() -> None:
    v = draw("gauss", 1000)
    codec = make("orq", levels=5, level_dtype="bf16", bucket=1000)
    levels = codec.levels(v)
    assert torch.equal(levels, levels.bfloat16().float()) and codec.biased
    low, high = float(levels[0, 0]), float(levels[0, -1])
    n = 2000
    mean = draws_of(codec, v, n).mean(0)
    width = float((levels[0, 1:] - levels[0, :-1]).max())
    assert bool(((mean - v.clamp(low, high)).abs() <= 5 * width / 2 / math.sqrt(n)).all())
    assert codec.expected_error(v) == pytest.approx(make("orq", levels=5).expected_error(v), rel=0.02)
    top = torch.full((4,), torch.finfo(torch.float32).max)
    assert bool(torch.isfinite(codec.decode(codec.encode(top, xutrain.key()))).all())


def test_majority_vote() -> None:
    votes = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    assert make("signsgd").combine(votes.mean(0)).tolist() == [1, 1, -1]
    assert make("signsgd", vote=False).combine(votes.mean(0)).tolist() == [1, 0, -1]
    out = make("signsgd").decode(make("signsgd").encode(torch.tensor([0.0, -0.0, -2.0, 3.0])))
    assert out.tolist() == [1, 1, -1, 1]


def test_full_precision_is_the_identity() -> None:
    v = draw("t3", 77)
    payload = make("fp").encode(v)
    v[0] = 9.0  # the payload does not share memory with the vector
    assert payload.bits == 32 * 77 and torch.equal(make("fp").decode(payload)[1:], v[1:]) and make("fp").decode(payload)[0] != 9.0
    assert make("fp16").decode(make("fp16").encode(torch.tensor([1e9, -1e9]))).tolist() == [65504, -65504]


# --- options and names


def test_even_levels_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(RecipeError, match=r"3, 5, 9, 17.*refine"):
        make("orq", levels=4)
    codec = make("orq", levels=4, refine=8)
    assert codec.label == "orq-4-refine8" and codec.levels(WORKED).shape == (1, 4)


def test_unknown_names_and_options() -> None:
    with pytest.raises(RecipeError, match=r"did you mean.*orq"):
        make("orqq")
    with pytest.raises(RecipeError, match="did you mean levels"):
        make("orq", levles=9)
    with pytest.raises(RecipeError) as caught:
        make("orq", bucket=0, clip=-1.0)
    assert len(caught.value.issues) == 2
    assert make("bingrad-b").label == "bingrad-b" and make("cdf").options.name == "quantile"


def test_labels_tell_variants_apart() -> None:
    labels = [make(name, **options).label for name, options in ALL]
    assert len(set(labels)) == len(labels)
    assert {"orq-9", "bingrad-pb", "bingrad-b", "terngrad", "qsgd-5", "eden-3", "pb-orq-3", "scaled-sign"} <= set(labels)


def test_every_codec_is_a_codec() -> None:
    for name, options in ALL:
        codec = make(name, **options)
        assert isinstance(codec, Codec) and codec.entry.name == codec.options.name == name
        assert codec.entry.summary


@pytest.mark.parametrize(("name", "options"), ALL, ids=[named(n, o) for n, o in ALL])
def test_tensor_path_gives_the_same_payload(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, run on CPU tensors: same bytes, same vector."""
    codec, v = make(name, **options), draw("laplace", 5000)
    here = codec.encode(v, xutrain.key(3))
    out = codec.decode(here)
    uniform = rng._uniform_on
    monkeypatch.setattr(rng.Key, "uniform", lambda key, n, device="cpu", start=0: uniform(key.words, n, torch.device(device), start))
    monkeypatch.setattr(rounding, "on_host", lambda device: False)
    monkeypatch.setattr(eden, "on_host", lambda device: False)
    there = codec.encode(v, xutrain.key(3))
    assert torch.equal(there.data, here.data) and torch.equal(codec.decode(there), out)


LONG_SUMS: list[tuple[str, dict[str, Any]]] = [
    ("orq", {}),
    ("bingrad_b", {}),
    ("scaled_sign", {"scope": "global"}),
    ("qsgd", {"norm": "l2"}),
    ("terngrad", {"clip": 2.5}),
    ("eden", {}),
]


@pytest.mark.parametrize(("name", "options"), LONG_SUMS, ids=[named(n, o) for n, o in LONG_SUMS])
def test_bytes_do_not_depend_on_threads(name: str, options: dict[str, Any]) -> None:
    """Processes with different numbers of threads must agree, long buckets included."""
    codec, v = make(name, bucket=1 << 17, **options), draw("t3", 150_000)
    one, three = with_threads(1, lambda: codec.encode(v, xutrain.key(1))), with_threads(3, lambda: codec.encode(v, xutrain.key(1)))
    assert torch.equal(one.data, three.data)
    assert torch.equal(with_threads(1, lambda: codec.decode(one)), with_threads(3, lambda: codec.decode(one)))


def test_row_sums_do_not_depend_on_threads() -> None:
    rows = (draw("t3", 200_000).double() * math.pi).view(1, -1)
    expected = pytest.approx(math.fsum(rows[0].tolist()), rel=1e-9)
    found = [float(with_threads(n, lambda: rounding.row_sums(rows))) for n in (1, 2, 3, 4)]
    assert len(set(found)) == 1 and found[0] == expected
    assert len({float(with_threads(n, lambda: rows.sum(dtype=torch.float64))) for n in (1, 2, 3, 4)}) > 1  # what it protects from


def with_threads(count: int, work: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)
