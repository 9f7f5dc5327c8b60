"""Layer-local distillation as a stream: masks kept, errors fall, the same files after a stop and on several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import digest, save, tokens

from xutrain.engine.workers import Workers
from xutrain.errors import RecipeError, Stopped, UsageError
from xutrain.methods.prune.base import Expert
from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.distill_layers import distil_layers, error
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source
from xutrain.recipe.load import load
from xutrain.recipe.prune import Distill

OPTIONS = Distill(mode="layers", inputs="teacher", steps=12, batch_size=2, length=24, lr=1e-2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    save("mixtral", folder / "dense", num_hidden_layers=2)
    for name, p in (("half", 0.5), ("none", 0.0)):
        prune_checkpoint(folder / "dense", folder / name, tokens(), sparsity=p, save_masks=folder / f"{name}-masks")
    return folder


def go(folders: Path, out: Path, name: str = "half", **more: Any) -> list[dict[str, Any]]:
    return distil_layers(folders / "dense", folders / name, folders / f"{name}-masks", out, tokens(8), OPTIONS, batch=2, **more)


def test_errors_fall_masks_stay_and_the_rest_is_untouched(folders: Path, tmp_path: Path) -> None:
    rows = go(folders, tmp_path / "out")
    arch, before, after = Architecture.read(folders / "dense"), Source(folders / "half"), Source(tmp_path / "out")
    assert [(r["layer"], r["expert"]) for r in rows] == [(layer, e) for layer in range(2) for e in range(arch.experts)]
    assert all(r["after"] <= r["before"] for r in rows) and sum(r["after"] < 0.8 * r["before"] for r in rows) >= len(rows) // 2
    experts = {n for layer in range(2) for n in arch.expert_names(layer)}
    for name in before.entries:
        old, new = before.read(name), after.read(name)
        assert new.dtype == old.dtype
        if name in experts:
            assert not new[old == 0].any()  # random weights of the fixture are never zero by themselves
        else:
            assert torch.equal(old, new)
    assert go(folders, tmp_path / "out") == rows  # finished: recalled


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_nothing_pruned_means_nothing_changes(folders: Path, tmp_path: Path, compute: torch.dtype) -> None:
    """Both experts are computed alike, so rounding of the forward pass is no error to be trained away."""
    assert all(r["before"] == 0 for r in go(folders, tmp_path / "out", "none", compute=compute))
    assert digest(tmp_path / "out") == digest(folders / "dense")


def _ranked(folders: Path, out: Path) -> int:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return len(go(folders, out, workers=Workers(count, rank, count)))


def test_stopped_and_on_two_processes_the_same_files(folders: Path, tmp_path: Path, forked: Any) -> None:
    go(folders, tmp_path / "whole")
    forked(_ranked, 2, folders, tmp_path / "two")
    with pytest.raises(Stopped):
        go(folders, tmp_path / "parts", progress=lambda done, total: True)
    go(folders, tmp_path / "parts")
    assert digest(tmp_path / "whole") == digest(tmp_path / "two") == digest(tmp_path / "parts")


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    expert = Expert(torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6))
    assert error(expert, expert, torch.empty(0, 4), 8) == 0.0


def test_taken_folders_and_wrong_options_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output folder"):
        go(folders, folders / "half")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        go(folders, tmp_path)
    with pytest.raises(RecipeError, match=r"distill\.inputs"):
        load("distill", "prune", ["distill.mode=layers"])
