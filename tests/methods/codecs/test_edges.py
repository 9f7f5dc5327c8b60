"""What a stranger hands to a codec: any float type, any stride, any size of numbers, bytes at any address, and mistakes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from codec_cases import ALL, draw, make, named
from torch import Tensor

import xutrain
from xutrain.engine.replica import Slice
from xutrain.errors import UsageError
from xutrain.methods.codecs.base import NonFinite

SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("top_k", {"ratio": 3}),
    ("random_k", {"ratio": 3}),
    ("random_k", {"ratio": 3, "rescale": True}),
    ("random_block", {"ratio": 3}),
    ("random_block", {"ratio": 3, "scope": "grid", "balanced": True}),
    ("low_rank", {"rank": 2}),
]
EVERY = [*ALL, *SPARSE, ("orq", {"levels": 129}), ("linear", {"levels": 256}), ("quantile", {"levels": 2, "bucket": 7, "clip": 0.5})]
each_codec = pytest.mark.parametrize(("name", "options"), EVERY, ids=[named(n, o) for n, o in EVERY])
KEY = xutrain.key(3, "round", 2, 1)


def inputs() -> Iterator[Tensor]:
    v = draw("laplace", 201)
    yield from (v[:n] for n in (0, 1, 2, 5))
    yield from (v.to(d) for d in (torch.float16, torch.bfloat16, torch.float64))
    yield v[::2]
    yield v.clone().requires_grad_()
    yield torch.tensor([2.5]).expand(77)
    yield from (torch.full((70,), x) for x in (0.0, -0.0, -1.25, 3.4e38))
    yield v / v.abs().max() * 3.4e38
    yield v * 1e-44
    yield torch.where(torch.arange(70) == 7, 3e38, 0.0)
    yield torch.where(torch.arange(70) == 7, -3.4e38, 3.4e38)


@each_codec
def test_any_finite_vector(name: str, options: dict[str, Any]) -> None:
    """Finite numbers come back as finite float32; the input is left as it was; the bits are the formula's; a pickle is small."""
    codec = make(name, **options)
    for v in inputs():
        before = v.detach().clone()
        payload = codec.encode(v, KEY)
        assert torch.equal(v.detach(), before) and payload.bits == codec.payload_bits(len(v))
        out = codec.decode(payload)
        assert out.dtype == torch.float32 and out.shape == v.shape and not out.requires_grad
        assert bool(torch.isfinite(out).all()), before[:8]
        text = pickle.dumps(payload)
        assert len(text) < payload.data.numel() + 2000
        assert torch.equal(make(name, **options).decode(pickle.loads(text)), out)
        if float(before.abs().sum()) == 0 and name != "signsgd":
            assert float(out.abs().sum()) == 0


@each_codec
def test_bytes_at_any_address(name: str, options: dict[str, Any]) -> None:
    """A receiver cuts messages out of one buffer, wherever they begin."""
    codec, v = make(name, **options), draw("gauss", 203)
    payload = codec.encode(v, KEY)
    expected, n = codec.decode(payload), payload.data.numel()
    for shift in (1, 2, 3, 5):
        buffer = torch.zeros(n + shift, dtype=torch.uint8)
        buffer[shift:] = payload.data
        assert torch.equal(codec.decode(xutrain.Payload(buffer[shift:], 203, payload.key)), expected)
    spread = torch.stack((payload.data, payload.data), 1)[:, 0]
    assert torch.equal(codec.decode(xutrain.Payload(spread, 203, payload.key)), expected)


@each_codec
def test_bytes_of_another_size_are_refused(name: str, options: dict[str, Any]) -> None:
    codec, v = make(name, **options), draw("gauss", 203)
    payload = codec.encode(v, KEY)
    longer = torch.cat((payload.data, payload.data[:1]))
    for data, length in ((payload.data[:-1], 203), (longer, 203), (payload.data, 0), (payload.data.float(), 203)):
        with pytest.raises(UsageError, match=r"payload: .* takes"):
            codec.decode(xutrain.Payload(data, length, payload.key))


@each_codec
def test_what_is_no_vector_is_refused(name: str, options: dict[str, Any]) -> None:
    codec = make(name, **options)
    for wrong in (torch.arange(5), torch.ones(3, 4), torch.tensor(1.0), torch.ones(4, dtype=torch.complex64), [1.0, 2.0]):
        with pytest.raises(UsageError, match="vector: must be"):
            codec.encode(wrong, KEY)


@pytest.mark.parametrize(("name", "options"), SPARSE, ids=[named(n, o) for n, o in SPARSE])
@pytest.mark.parametrize("at", [0, 17, 49])
def test_non_finite_is_refused_wherever_it_is(name: str, options: dict[str, Any], at: int) -> None:
    """Also where it would not be sent this time."""
    v = torch.zeros(50)
    v[at] = float("nan")
    with pytest.raises(NonFinite, match=f"element {at} of the vector"):
        make(name, **options).encode(v, KEY)


@pytest.mark.parametrize("name", ["random_k", "random_block"])
def test_another_layout_is_another_draw(name: str) -> None:
    """A codec that served one model serves the next as a new one does, though it has as many tensors and elements."""
    first, second = ([Slice("a", (n,), 0, n), Slice("b", (100 - n,), n, 100)] for n in (10, 80))
    v = draw("gauss", 100)
    used, new = make(name, ratio=5), make(name, ratio=5)
    used.lay(first)
    used.encode(v, KEY)
    used.lay(second)
    new.lay(second)
    payload = used.encode(v, KEY)
    assert torch.equal(payload.data, new.encode(v, KEY).data) and torch.equal(used.decode(payload), new.decode(payload))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scaled_sign", {"scope": "tensor"}),
        ("top_k", {"ratio": 2}),
        ("random_k", {"ratio": 2}),
        ("low_rank", {}),
        ("random_block", {"ratio": 2}),
    ],
)
def test_a_tensor_without_elements_changes_nothing(name: str, options: dict[str, Any]) -> None:
    full = [Slice("a", (2, 3), 0, 6), Slice("b", (5,), 6, 11)]
    more = [full[0], Slice("e", (0,), 6, 6), Slice("m", (0, 4), 6, 6), full[1]]
    plain, codec = make(name, **options), make(name, **options)
    plain.lay(full)
    codec.lay(more)
    v = draw("gauss", 11)
    one, other = plain.encode(v, xutrain.key()), codec.encode(v, xutrain.key())
    assert torch.equal(one.data, other.data) and other.bits == codec.payload_bits(11)
    assert torch.equal(plain.decode(one), codec.decode(other))
