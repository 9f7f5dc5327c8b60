"""The compiled kernels against the pure path, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_cases import ALL, draw, make, named

import xutrain
from xutrain.methods.codecs import fast

pytest.importorskip("numba")


@pytest.fixture
def compiled() -> Any:
    module = fast.load()
    if module is None:
        pytest.skip("compiled kernels are turned off")
    return module


@pytest.mark.parametrize(("name", "options"), ALL, ids=[named(n, o) for n, o in ALL])
@pytest.mark.parametrize("kind", ["t3", "ties", "huge"])
def test_same_bytes(name: str, options: dict[str, Any], kind: str, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    v = draw("t3", 9000)
    if kind == "ties":
        v = v.round() + 0.0
        v[2048:4096] = 1.0
    if kind == "huge":
        v = v / v.abs().max() * 3.4e38
    codec = make(name, **options)
    found = codec.encode(v, xutrain.key(2))
    out = codec.decode(found)
    monkeypatch.setattr(fast, "kernels", lambda elements: None)
    pure = codec.encode(v, xutrain.key(2))
    assert torch.equal(found.data, pure.data)
    assert torch.equal(out, codec.decode(pure))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 128, 2048])
def test_same_transform(size: int, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xutrain.methods.codecs.walsh import hadamard

    for count in (1, 15, 16, 33):
        rows = draw("gauss", count * size).view(count, size)
        found = hadamard(rows)
        assert torch.allclose(hadamard(found) / size, rows, atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(fast, "kernels", lambda elements: None)
            assert torch.equal(found, hadamard(rows))


def test_turned_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XUTRAIN_PURE", "1")
    fast._loaded.cache_clear()
    assert fast.load() is None
    fast._loaded.cache_clear()


def test_loaded_only_once_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(fast, "_loaded", lambda: loaded.append(1))
    monkeypatch.setattr(fast, "_lost", 0.0)
    fast.kernels(1000)
    assert not loaded
    for _ in range(100):
        fast.kernels(25_000_000)
    assert loaded
