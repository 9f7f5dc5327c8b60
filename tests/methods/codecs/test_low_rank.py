"""The rank-r factors: a projection whatever the rank and the size of the matrix, and a factor that never dies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.methods.codecs.low_rank import LowRank, orthonormal

ROWS, COLUMNS = 64, 20


def matrix(rank: int, seed: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (ROWS, COLUMNS))
    return (left @ right.t() * size).to(dtype)


def codec(rank: int) -> LowRank:
    made = LowRank(LowRank.Options(rank=rank))
    made.lay([Slice("weight", (ROWS, COLUMNS), 0, ROWS * COLUMNS)])
    return made


def send(made: LowRank, vectors: list[Tensor], step: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The mean of one exchange and every worker's residual."""
    left = [v.clone().reshape(-1) for v in vectors]
    mean = made.reduce(left, lambda sent: torch.stack(sent).mean(0), Key(0, "low_rank", step))
    return mean, left


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("rank", "true"), [(1, 1), (4, 1), (4, 2), (8, 2), (20, 20), (64, 3)])
def test_a_matrix_of_no_higher_rank_comes_back(rank: int, true: int, size: float) -> None:
    for seed in range(5):
        v = matrix(true, seed, size).reshape(-1)
        made = codec(rank)
        for step in range(3):  # from a random factor, then warm
            mean, _ = send(made, [v], step)
            assert (v - mean).norm() <= 1e-4 * v.norm()
        assert (v - made.decode(made.encode(v))).norm() <= 1e-4 * v.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_is_orthonormal_and_leaves_out_what_depends(dtype: torch.dtype) -> None:
    for seed in range(10):
        basis = orthonormal(matrix(3, seed, 1e-3, dtype)[:, :6])
        gram = basis.t() @ basis
        kept = gram.diagonal().round()
        assert kept.sum() == 3, "the columns that lie in the span of the others are zero"
        assert torch.allclose(gram, torch.diag(kept), atol=1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.equal(orthonormal(torch.zeros(4, 2, dtype=dtype)), torch.zeros(4, 2, dtype=dtype))


def test_the_error_is_never_larger_than_the_matrix() -> None:
    for seed in range(10):
        for rank in (1, 3, 8):
            v = matrix(1 + seed, seed, 1e-3).reshape(-1)
            assert (v - send(codec(rank), [v])[0]).norm() <= v.norm() * (1 + 1e-6)


def test_a_message_of_zeros_does_not_silence_the_tensor() -> None:
    made = codec(2)
    send(made, [torch.zeros(ROWS * COLUMNS)] * 2)
    v = matrix(2, 0).reshape(-1)
    mean, left = send(made, [v, v], 1)
    assert (mean - v).norm() <= 1e-4 * v.norm() and all(r.norm() <= 1e-4 * v.norm() for r in left)
    send(made, [matrix(1, 1).reshape(-1)], 2)  # a message of rank 1 leaves the second direction as it was
    assert float(made.factors["weight"].norm(dim=0).min()) == pytest.approx(1.0)


def test_factors_of_another_rank_are_not_gone_on_with() -> None:
    made, other = codec(2), codec(3)
    v = matrix(3, 0).reshape(-1)
    send(made, [v])
    other.load_state(made.state())
    assert (send(other, [v], 1)[0] - v).norm() <= 1e-4 * v.norm()


def test_power_iteration_finds_the_largest_direction() -> None:
    """Warm started on one matrix, the error tends to what the singular value decomposition leaves."""
    v = matrix(20, 3)
    least = torch.linalg.svdvals(v)[2:].square().sum().sqrt()
    made = codec(2)
    for step in range(60):
        mean, _ = send(made, [v], step)
    assert (v.reshape(-1) - mean).norm() == pytest.approx(float(least), rel=1e-3)
