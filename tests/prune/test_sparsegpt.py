from __future__ import annotations

import pytest
import torch
from prune_layer import rng

from xutrain.errors import Failed
from xutrain.methods.prune.masks import Pattern, matrix_mask, row_mask
from xutrain.methods.prune.sparsegpt import sparsegpt


def problem(rows: int = 6, d: int = 32, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    mix = torch.randn(d, d, generator=rng(1), dtype=torch.float64)
    x = torch.randn(n, d, generator=rng(2), dtype=torch.float64) @ mix
    return torch.randn(rows, d, generator=rng(3), dtype=torch.float64), x


def test_diagonal_hessian_compensates_nothing() -> None:
    w, _ = problem()
    h = torch.diag(torch.rand(32, generator=rng(4), dtype=torch.float64) + 0.5)
    new, mask = sparsegpt(w, h, Pattern(0.5))
    assert torch.allclose(new[mask], w[mask], rtol=1e-14) and not new[~mask].any()


def test_identity_hessian_is_magnitude_inside_a_block() -> None:
    w, _ = problem(d=32)
    for pattern in (Pattern(0.5), Pattern.parse("2:4")):
        _, mask = sparsegpt(w, 3 * torch.eye(32, dtype=torch.float64), pattern, block=16)
        blocks = torch.cat([matrix_mask(b.abs(), pattern) for b in w.split(16, 1)], 1)
        assert torch.equal(mask, blocks)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern.parse("2:4"), Pattern.parse("1:4")])
@pytest.mark.parametrize("invariant", [False, True])
def test_update_beats_the_same_mask_without_it(pattern: Pattern, invariant: bool) -> None:
    w, x = problem()
    new, mask = sparsegpt(w, x.T @ x, pattern, block=8, invariant=invariant)
    assert not new[~mask].any()
    if pattern.of:
        assert (mask.view(6, -1, 4).sum(-1) == pattern.keep).all()
    plain = ((w - w * mask) @ x.T).norm()
    assert ((w - new) @ x.T).norm() < 0.95 * plain


def test_invariant_form_follows_a_rescaling_of_channels() -> None:
    w, x = problem()
    c = torch.randn(32, generator=rng(7), dtype=torch.float64).exp()
    new, mask = sparsegpt(w, x.T @ x, Pattern(0.5), invariant=True)
    twin, twin_mask = sparsegpt(w / c, (x * c).T @ (x * c), Pattern(0.5), invariant=True)
    assert torch.equal(mask, twin_mask) and torch.allclose(twin * c, new)


def test_first_block_equals_the_closed_form_of_optimal_brain_surgeon() -> None:
    """One row, one weight lost: w - w_p / [H^-1]_pp H^-1[:, p], restricted to the columns that come after."""
    w, x = problem(rows=1, d=6)
    h = x.T @ x
    new, mask = sparsegpt(w, h, Pattern(1 / 6), damping=1e-12, block=6, invariant=True)
    assert int((~mask).sum()) == 1
    p = int((~mask)[0].nonzero()[0, 0])
    inverse = torch.linalg.inv(h[p:, p:])
    expected = w[0, p:] - w[0, p] / inverse[0, 0] * inverse[0]
    assert torch.allclose(new[0, p:], expected, atol=1e-9) and torch.allclose(new[0, :p], w[0, :p])


def test_dead_columns_go_and_a_hopeless_hessian_is_named() -> None:
    w, x = problem()
    x[:, 3] = 0
    new, mask = sparsegpt(w, x.T @ x, Pattern(0.5))
    assert not new[:, 3].any() and not mask[:, 3].any()
    with pytest.raises(Failed, match="positive definite"):
        sparsegpt(w, -(x.T @ x) - torch.eye(32, dtype=torch.float64), Pattern(0.5))


def test_row_mask_agrees_with_groups_of_the_invariant_form() -> None:
    w, _ = problem()
    _, mask = sparsegpt(w, torch.eye(32, dtype=torch.float64), Pattern(0.5), block=32, invariant=True)
    assert torch.equal(mask, row_mask(w.abs(), Pattern(0.5)))
