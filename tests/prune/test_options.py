"""Options that cannot be, or that cannot be had together: an error, never a file of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import digest, save, tokens
from torch import Tensor

from xutrain.errors import DataError, RecipeError, UsageError
from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.drop import drop_experts
from xutrain.methods.prune.moments import Moments
from xutrain.methods.prune.wanda import Wanda
from xutrain.recipe.load import load


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options") / "dense"
    save("mixtral", folder, num_hidden_layers=2)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.5},
        {"sparsity": -0.1},
        {"sparsity": float("nan")},
        {"batch": 0},
        {"chunk": 0},
        {"save_every": 0},
        {"propagate": "bogus"},
        {"targets": "attn"},
        {"compute": torch.int32},
    ],
    ids=str,
)
def test_python_arguments_are_checked_like_a_recipe(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        prune_checkpoint(dense, tmp_path / "out", tokens(), **options)
    assert not (tmp_path / "out").exists()


def test_tokens_must_be_integers(dense: Path, tmp_path: Path) -> None:
    for wrong in (tokens().float(), tokens().tolist()):
        with pytest.raises(DataError, match="integers"):
            prune_checkpoint(dense, tmp_path / "out", wrong)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="propagate"):
        drop_experts(dense, tmp_path / "out", tokens(), method={"name": "reap", "keep": 3}, propagate="x")  # type: ignore[arg-type]


def test_cached_sums_belong_to_one_method_one_model_and_no_repair(dense: Path, tmp_path: Path) -> None:
    every = {"name": "wanda", "all_tokens": True}
    prune_checkpoint(dense, tmp_path / "first", tokens(), method=every, propagate="dense", save_sums=tmp_path / "sums")
    with pytest.raises(RecipeError, match="another method"):
        prune_checkpoint(dense, tmp_path / "out", tokens(), method="wanda", from_sums=tmp_path / "sums")
    for more in ({"rescale": True}, {"targets": "experts+attn"}, {"save_sums": tmp_path / "more"}):
        with pytest.raises(RecipeError, match="from_sums"):
            prune_checkpoint(dense, tmp_path / "out", tokens(), method=every, from_sums=tmp_path / "sums", **more)  # type: ignore[arg-type]
    save("mixtral", tmp_path / "wider", num_hidden_layers=2, hidden_size=40)
    with pytest.raises(DataError, match="another model"):
        prune_checkpoint(tmp_path / "wider", tmp_path / "out", tokens(), method=every, from_sums=tmp_path / "sums")
    (tmp_path / "sums" / "sums.json").write_text("[]")
    with pytest.raises(DataError, match="no finished calibration sums"):
        prune_checkpoint(dense, tmp_path / "out", tokens(), method=every, from_sums=tmp_path / "sums")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compute", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_of_all_tokens_cut_the_same_also_where_an_expert_got_none(tmp_path: Path, compute: torch.dtype) -> None:
    save("mixtral", tmp_path / "dense", num_hidden_layers=1, num_local_experts=8)
    one, how = tokens(1, 2), {"method": {"name": "wanda", "all_tokens": True, "min_tokens": 2}, "compute": compute}
    fresh = prune_checkpoint(tmp_path / "dense", tmp_path / "fresh", one, propagate="dense", save_sums=tmp_path / "sums", **how)
    assert any(r["tokens"] == 0 for r in fresh.experts) and not fresh.fallbacks
    again = prune_checkpoint(tmp_path / "dense", tmp_path / "again", one, from_sums=tmp_path / "sums", **how)
    assert digest(tmp_path / "again") == digest(tmp_path / "fresh") and not again.fallbacks
    assert [r["tokens"] for r in again.experts] == [r["tokens"] for r in fresh.experts]


def test_a_finished_folder_without_masks_is_not_taken_for_one_with_masks(dense: Path, tmp_path: Path) -> None:
    prune_checkpoint(dense, tmp_path / "out", tokens(), method="magnitude")
    for more in ({"save_masks": tmp_path / "masks"}, {"method": "wanda", "save_sums": tmp_path / "sums"}):
        with pytest.raises(UsageError, match="another pruning"):
            prune_checkpoint(dense, tmp_path / "out", tokens(), **{"method": "magnitude", **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.name=reap", "distill={steps: 2}"], "distill.*no masks"),
        (["method.name=reap", "rescale=true"], "prune weights"),
        (["method.name=naee", 'pattern="2:4"'], "prune weights"),
        (["from_sums=x", "rescale=true"], "from_sums.*no tokens"),
    ],
)
def test_recipes_that_would_leave_something_out(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load("moe_pruner", "prune", overrides)


class Named(Moments):
    """Sums of a method of one's own, under names of its own."""

    def state(self) -> dict[str, Tensor]:
        return {"inputs": self.x, "inner.h": self.h}


class Own(Wanda):
    statistics = Named

    def scores(self, expert: Any, sums: Any) -> dict[str, Tensor]:
        return super().scores(expert, {"x": sums["inputs"], "h": sums["inner.h"]})


def test_sums_of_any_name_come_back(dense: Path, tmp_path: Path) -> None:
    own = Own(Wanda.Options(name="wanda"))
    prune_checkpoint(dense, tmp_path / "fresh", tokens(), method=own, propagate="dense", save_sums=tmp_path / "sums")
    prune_checkpoint(dense, tmp_path / "again", tokens(), method=own, from_sums=tmp_path / "sums")
    assert digest(tmp_path / "again") == digest(tmp_path / "fresh")
