from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from xutrain.methods.codecs import packing, rounding

BASES = [2, 3, 4, 5, 6, 7, 9, 16, 17, 33, 129, 255, 256]


@pytest.mark.parametrize("base", BASES)
def test_round_trip_for_every_length(base: int) -> None:
    rng = np.random.default_rng(base)
    for n in range(201):
        q = torch.from_numpy(rng.integers(0, base, n).astype(np.uint8))
        data = packing.pack(q, base)
        assert data.dtype == torch.uint8 and data.shape == (packing.packed_bytes(base, n),)
        assert torch.equal(packing.unpack(data, base, n), q)


@pytest.mark.parametrize("base", BASES)
def test_extreme_symbols_and_many_chunks(base: int) -> None:
    n = 5 * packing._CHUNK * 3 + 17
    q = torch.full((n,), base - 1, dtype=torch.uint8)
    q[::7] = 0
    assert torch.equal(packing.unpack(packing.pack(q, base), base, n), q)


@pytest.mark.parametrize(("base", "symbols", "size"), [(2, 8, 1), (3, 5, 1), (5, 24, 7), (9, 5, 2), (17, 15, 8)])
def test_bytes_equal_the_published_layouts(base: int, symbols: int, size: int) -> None:
    for n in range(201):
        assert packing.packed_bytes(base, n) == math.ceil(n / symbols) * size


def test_byte_layouts_by_hand() -> None:
    # one group: planar order is the order of the symbols
    assert packing.pack(torch.tensor([1, 2, 0, 1, 2], dtype=torch.uint8), 3).tolist() == [1 + 3 * 2 + 27 + 81 * 2]
    assert packing.pack(torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 2).tolist() == [1 + 64 + 128]
    word = 8 + 9 * 7 + 81 * 6 + 729 * 5 + 6561 * 4
    assert packing.pack(torch.tensor([8, 7, 6, 5, 4], dtype=torch.uint8), 9).tolist() == [word % 256, word // 256]
    q = torch.arange(24, dtype=torch.uint8) % 5
    codes = [int(q[3 * i] + 5 * q[3 * i + 1] + 25 * q[3 * i + 2]) for i in range(8)]
    assert packing.pack(q, 5).tolist() == [codes[p] | (codes[7] >> p & 1) << 7 for p in range(7)]
    # two groups: symbol i of group j stands at i * 2 + j
    assert packing.pack(torch.tensor([1, 2, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8), 3).tolist() == [1, 2]


@pytest.mark.parametrize("base", BASES)
def test_tensor_operators_give_the_same_bytes(base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, run on CPU tensors."""
    q = torch.from_numpy(np.random.default_rng(1).integers(0, base, 1003).astype(np.uint8))
    data = packing.pack(q, base)
    monkeypatch.setattr(rounding, "on_host", lambda device: False)
    assert torch.equal(packing.pack(q, base), data)
    assert torch.equal(packing.unpack(data, base, 1003), q)
