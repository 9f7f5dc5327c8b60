from __future__ import annotations

import itertools

import pytest
import torch

from xutrain.errors import RecipeError
from xutrain.methods.prune.masks import Pattern, keep, matrix_mask, row_mask, sparsity


def reference(score: torch.Tensor, p: float) -> torch.Tensor:
    drop = int(score.shape[1] * p + 1e-9)
    order = torch.sort(score, dim=1, stable=True).indices[:, :drop]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_rows_equal_a_stable_sort_with_and_without_ties(p: float) -> None:
    g = torch.Generator().manual_seed(1)
    for score in (torch.rand(7, 33, generator=g), torch.randint(0, 4, (9, 33), generator=g).float(), torch.zeros(3, 10)):
        assert torch.equal(row_mask(score, Pattern(p)), reference(score, p))


def test_a_row_without_information_loses_its_first_columns_hence_the_fallback() -> None:
    assert row_mask(torch.zeros(1, 6), Pattern(0.5)).tolist() == [[False] * 3 + [True] * 3]


@pytest.mark.parametrize("text, kept", [("2:4", 2), ("4:8", 4), ("1:4", 1), ("3:4", 3), ("0:4", 0), ("4:4", 4)])
def test_n_of_m_means_kept(text: str, kept: int) -> None:
    pattern = Pattern.parse(text)
    score = torch.rand(5, 32, generator=torch.Generator().manual_seed(0))
    mask = row_mask(score, pattern)
    groups = mask.view(5, -1, pattern.of)
    assert (groups.sum(-1) == kept).all()
    assert pattern.sparsity == pytest.approx(sparsity(mask))
    held = score.view_as(groups)
    worst_kept = torch.where(groups, held, torch.inf).amin(-1)
    best_lost = torch.where(groups, -torch.inf, held).amax(-1)
    assert (worst_kept >= best_lost).all()


def test_mask_minimises_the_sum_of_squared_scores_by_brute_force() -> None:
    score = torch.rand(1, 9, generator=torch.Generator().manual_seed(5))
    for drop in range(10):
        mask = row_mask(score, Pattern(drop / 9))
        lost = (score[~mask] ** 2).sum()
        best = min(sum(float(score[0, j]) ** 2 for j in chosen) for chosen in itertools.combinations(range(9), drop))
        assert float(lost) == pytest.approx(best, abs=1e-6)


def test_matrix_threshold_is_inclusive_as_in_the_reference_code() -> None:
    score = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert matrix_mask(score, Pattern(0.5)).tolist() == [[False, False, False], [False, True, True]]  # threshold 3: both ties go
    assert matrix_mask(score, Pattern(0.0)).all() and not matrix_mask(score, Pattern(1.0)).any()


@pytest.mark.parametrize("text", ["4:2", "half", "2:0", "2-4", ""])
def test_bad_patterns_are_named(text: str) -> None:
    with pytest.raises(RecipeError, match="pattern"):
        Pattern.parse(text)


def test_groups_must_fill_the_row() -> None:
    with pytest.raises(RecipeError, match="not a multiple of 4"):
        row_mask(torch.rand(2, 10), Pattern.parse("2:4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_keep_is_a_selection_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 12).to(dtype)
    weight[0, 0], weight[0, 1], weight[1, 0] = -0.0, float("inf"), float("nan")
    mask = torch.rand(7, 12) < 0.5
    mask[0, 0], mask[0, 1], mask[1, 0] = True, False, False
    expected = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(keep(weight, mask).view(bits), expected.view(bits))
    assert torch.equal(keep(weight.T, mask.T).contiguous().view(bits), expected.T.contiguous().view(bits))  # not contiguous
    assert keep(weight, mask, out=weight) is weight and torch.equal(weight.view(bits), expected.view(bits))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:5", "1:1", "0:3", "4:16", "9:16"])
def test_groups_equal_a_stable_sort_with_ties(text: str) -> None:
    pattern = Pattern.parse(text)
    assert pattern.of is not None and pattern.keep is not None
    score = torch.randint(0, 4, (6, pattern.of * 5), generator=torch.Generator().manual_seed(1)).float()
    order = score.view(6, -1, pattern.of).sort(dim=2, stable=True).indices[:, :, : pattern.of - pattern.keep]
    expected = torch.ones(6, 5, pattern.of, dtype=torch.bool).scatter_(2, order, False).view(6, -1)
    assert torch.equal(row_mask(score, pattern), expected)
