"""Distillation keeps masks and follows eq. 10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import save, tokens

from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.distill import Distiller, masks_of
from xutrain.methods.prune.masks import Pattern, read_masks, row_mask, write_masks
from xutrain.models.decoder import Decoder
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source
from xutrain.recipe.prune import Distill


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    save("mixtral", folder / "dense", dtype=torch.float32, num_hidden_layers=2)
    for name, p in (("half", 0.5), ("none", 0.0)):
        prune_checkpoint(folder / "dense", folder / name, tokens(), sparsity=p, save_masks=folder / f"{name}-masks")
    return folder


def distiller(folders: Path, name: str = "half", **options: Any) -> Distiller:
    arch = Architecture.read(folders / "dense")
    models = []
    for part in (name, "dense"):
        model = Decoder(arch)
        model.load(Source(folders / part))
        models.append(model)
    return Distiller(models[0], models[1], masks_of(folders / f"{name}-masks", arch), Distill(**options))


def test_masks_survive_the_disk(tmp_path: Path) -> None:
    masks = {role: row_mask(torch.rand(5, columns), Pattern(0.4)) for role, columns in (("gate", 13), ("down", 21))}
    write_masks(tmp_path, 3, 1, masks)
    found = read_masks(tmp_path, 3, 1, {"gate": 13, "down": 21})
    assert all(torch.equal(found[r], masks[r]) for r in masks)


@pytest.mark.parametrize("options", [{}, {"inputs": "teacher"}, {"tokens": "both"}, {"train": "experts", "weight_decay": 0.5}])
def test_first_step_balances_the_losses_and_masks_stay(folders: Path, options: dict[str, Any]) -> None:
    d = distiller(folders, lr=1e-2, **options)
    before = {n: p.detach().clone() for n, p in d.student.named_parameters()}
    teacher = {n: p.detach().clone() for n, p in d.teacher.named_parameters()}
    first = d.step(tokens(4, 17, seed=7), 1e-2)
    assert first.factor * first.expert == pytest.approx(first.ce, rel=1e-5)
    for _ in range(4):
        last = d.step(tokens(4, 17, seed=7), 1e-2)
    assert last.factor == first.factor and last.ce < first.ce
    for parameter, mask in d.masks:
        assert not parameter[~mask].any()
    moved = {n for n, p in d.student.named_parameters() if not torch.equal(p, before[n])}
    assert all(("experts" in n) for n in moved) if options.get("train") == "experts" else "model.norm.weight" in moved
    assert all(torch.equal(p, teacher[n]) for n, p in d.teacher.named_parameters())


def test_nothing_pruned_means_no_expert_loss(folders: Path) -> None:
    step = distiller(folders, "none").step(tokens(2, 9), 0.0)
    assert step.expert == 0 and step.factor == 0


def test_factor_zero_is_cross_entropy_only(folders: Path) -> None:
    step = distiller(folders, expert_loss=0.0).step(tokens(2, 9), 1e-3)
    assert step.expert == 0 and step.factor == 0
