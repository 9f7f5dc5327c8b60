"""Cases shared by the codec tests, and float64 references that share no code with the codecs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

import xutrain
from xutrain.methods.codecs.base import Codec

WORKED = torch.tensor([-4.0, -1, -1, 0, 0.5, 1, 2, 8])
D = 2048
#: name, options, base, floats per bucket
WIRES: list[tuple[str, dict[str, Any], int, int]] = [
    ("orq", {"levels": 3}, 3, 3),
    ("orq", {"levels": 5}, 5, 5),
    ("orq", {"levels": 9}, 9, 9),
    ("orq", {"levels": 17}, 17, 17),
    ("bingrad_pb", {}, 2, 1),
    ("bingrad_pb", {"symmetric": False}, 2, 2),
    ("bingrad_b", {}, 2, 2),
    ("bingrad_b", {"threshold": "lloyd"}, 2, 2),
    ("terngrad", {}, 3, 1),
    ("terngrad", {"clip": 2.5}, 3, 1),
    ("qsgd", {"levels": 5}, 5, 1),
    ("qsgd", {"levels": 9, "norm": "l2"}, 9, 1),
    ("linear", {"levels": 5}, 5, 2),
    ("quantile", {"levels": 9}, 9, 9),
    ("onebit", {}, 2, 2),
    ("scaled_sign", {}, 2, 1),
    ("pb_orq", {"levels": 3}, 3, 3),
    ("k_orq", {"levels": 5, "effective_workers": 4}, 5, 5),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("fp", {}),
    ("fp16", {}),
    ("bf16", {}),
    ("signsgd", {}),
    ("scaled_sign", {"scope": "global"}),
    ("eden", {"levels": 2}),
    ("eden", {"levels": 3}),
    ("eden", {"levels": 5, "scale": "least_squares"}),
    ("eden", {"levels": 9}),
    ("orq", {"levels": 4, "refine": 3}),
    ("orq", {"levels": 9, "level_dtype": "bf16"}),
    ("linear", {"levels": 7}),
]
ALL = [(name, options) for name, options, _, _ in WIRES] + OTHERS


def named(name: str, options: dict[str, Any]) -> str:
    return "-".join([name, *(f"{k}={v}" for k, v in options.items())])


def make(name: str, **options: Any) -> Any:
    return xutrain.codec(name, **options)


def draw(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = {"gauss": rng.standard_normal, "laplace": lambda n: rng.laplace(size=n), "t3": lambda n: rng.standard_t(3, size=n)}[kind](n)
    return torch.from_numpy(values.astype(np.float32))


def relative(codec: Any, v: torch.Tensor) -> float:
    return codec.expected_error(v) / float(v.double().square().sum())


def draws_of(codec: Codec, v: torch.Tensor, n: int) -> torch.Tensor:
    """``n`` independent decodings of ``v``, float64 (n, len(v)); v is whole buckets, so that one long vector holds them all."""
    assert len(v) % codec.options.bucket == 0
    return codec.decode(codec.encode(v.repeat(n), xutrain.key(seed=1))).double().view(n, -1)


def cell_error(v: np.ndarray, low: float, high: float) -> float:
    """Expected squared error of random rounding between two levels."""
    return float(((high - v) * (v - low)).sum())


def error(v: np.ndarray, levels: np.ndarray) -> float:
    """Expected squared error of random rounding onto ascending levels, values outside clipped."""
    v, total = np.asarray(v, np.float64), 0.0
    for x in v:
        w = min(max(x, levels[0]), levels[-1])
        low = max(b for b in levels if b <= w)
        high = min(b for b in levels if b >= w)
        total += (high - w) * (w - low) + (x - w) ** 2
    return total


def optimal(v: np.ndarray, s: int) -> tuple[float, list[float]]:
    """Least error over all s levels with the extremes among them: dynamic programme over order statistics, O(s n^2)."""
    x = np.sort(np.asarray(v, np.float64))
    n = len(x)
    cost = np.full((n, n), np.inf)
    for i in range(n):
        for j in range(i, n):
            cost[i, j] = cell_error(x[i : j + 1], x[i], x[j])
    best, back = cost[0].copy(), []
    for _ in range(s - 2):
        through = best[:, None] + cost  # level at i, next one at j
        back.append(through.argmin(0))
        best = through.min(0)
    path = [n - 1]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return float(best[n - 1]), [float(x[i]) for i in [0, *reversed(path)]]


def wire_bits(n: int, bucket: int, base: int, sent: int, level_bits: int = 32) -> int:
    """The wire cost, from the formulas of the packing table."""
    per = {2: (8, 1), 3: (5, 1), 5: (24, 7), 9: (5, 2), 17: (15, 8)}[base]
    return math.ceil(n / per[0]) * per[1] * 8 + math.ceil(n / bucket) * sent * level_bits
