"""Attention as a target, and NAEE's dynamic skipping."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import CONFIGS, digest, save, tokens

from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.errors import RecipeError, Stopped
from xutrain.methods.prune.attention import names
from xutrain.methods.prune.base import Routing
from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.masks import Pattern
from xutrain.methods.prune.measure import open_forward, skip_thresholds, window_losses
from xutrain.methods.prune.skipping import median_ratio, skipped
from xutrain.methods.prune.wanda import Wanda
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source
from xutrain.recipe.load import load

BOTH: dict[str, Any] = {"method": "wanda", "targets": "experts+attn", "batch": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention") / "dense"
    save("mixtral", folder)
    return folder


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_attention_of_every_family_is_cut_and_nothing_else(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "dense")
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", tokens(), **BOTH)
    arch, before, after = Architecture.read(tmp_path / "dense"), Source(tmp_path / "dense"), Source(tmp_path / "out")
    cut, experts = names(arch, before), {n for layer in range(arch.layers) for n in arch.expert_names(layer)}
    assert len(cut) >= 4 * arch.layers and 0.45 < report.attention <= 0.5
    for name in before.entries:
        old, new = before.read(name), after.read(name)
        if name in cut:
            assert ((new == 0).sum(1) == old.shape[1] // 2).all() and torch.equal(new[new != 0], old[new != 0]), name
        elif name not in experts:
            assert torch.equal(old, new), name


def test_first_attention_is_wandas_mask_by_the_plainest_code(dense: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    prune_checkpoint(dense, tmp_path / "out", tokens(), **BOTH)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64, experts_implementation="eager")
    seen: list[torch.Tensor] = []
    query = model.model.layers[0].self_attn.q_proj
    query.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(tokens())
    score = query.weight.abs() * torch.cat(seen).norm(dim=0)
    order = torch.sort(score, dim=1, stable=True).indices[:, : score.shape[1] // 2]
    expected = query.weight.data.scatter(1, order, 0.0)
    assert torch.equal(Source(tmp_path / "out").read("model.layers.0.self_attn.q_proj.weight").double(), expected)


def _ranked(dense: Path, out: Path) -> float:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return prune_checkpoint(dense, out, tokens(), workers=Workers(count, rank, count), **BOTH).attention


def test_stopped_and_on_two_processes_the_same_files(dense: Path, tmp_path: Path, forked: Any) -> None:
    whole = prune_checkpoint(dense, tmp_path / "whole", tokens(), **BOTH)
    assert forked(_ranked, 2, dense, tmp_path / "two") == [whole.attention] * 2
    with pytest.raises(Stopped):
        prune_checkpoint(dense, tmp_path / "parts", tokens(), progress=lambda done, total: True, **BOTH)
    assert prune_checkpoint(dense, tmp_path / "parts", tokens(), **BOTH).attention == whole.attention
    assert digest(tmp_path / "whole") == digest(tmp_path / "two") == digest(tmp_path / "parts")


def test_no_sparsity_changes_nothing_and_magnitude_looks_at_no_data(dense: Path, tmp_path: Path) -> None:
    prune_checkpoint(dense, tmp_path / "none", tokens(), sparsity=0.0, **BOTH)
    assert digest(tmp_path / "none") == digest(dense)
    for seed in (1, 2):
        prune_checkpoint(dense, tmp_path / str(seed), tokens(seed=seed), **{**BOTH, "method": {"name": "magnitude", "group": "row"}})
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


@pytest.mark.parametrize("more", [["method.name=sparsegpt"], ["method.name=reap"], ["save_sums=true"], ["distill={}"]])
def test_what_attention_cannot_be_combined_with(more: list[str]) -> None:
    with pytest.raises(RecipeError, match="targets"):
        load("moe_pruner", "prune", ["targets=experts+attn", *more])


def test_skipping_limits() -> None:
    torch.manual_seed(0)
    weight = torch.rand(50, 2, dtype=torch.float64)
    weight = weight / weight.sum(1, keepdim=True)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    routing = Routing(index, weight, torch.zeros(50, 4))
    same, one = skipped(routing, 0.0), skipped(routing, 1.0 + 1e-9)
    for e in range(4):  # 0 skips nothing; above 1 is top-1 with the whole weight
        assert torch.equal(same.routed(e)[0], routing.routed(e)[0]) and torch.equal(same.routed(e)[1], routing.routed(e)[1])
    best = index.gather(1, weight.argmax(1, keepdim=True)).squeeze(1)
    assert all(torch.equal(one.routed(e)[0], (best == e).nonzero().squeeze(1)) for e in range(4))
    assert torch.allclose(one.weight[:, 0], torch.ones(50, dtype=torch.float64))
    half = skipped(routing, median_ratio(routing))
    assert abs(int((half.index == -1).sum()) - 25) <= 1
    with pytest.raises(RecipeError, match="two experts"):
        median_ratio(Routing(index[:, :1], weight[:, :1], routing.prob))


def test_skipping_in_the_stream(dense: Path) -> None:
    forward, data = open_forward(dense), tokens(3, 20)
    betas = skip_thresholds(forward, data)
    assert len(betas) == 3 and all(0 < b <= 1 for b in betas)
    plain = window_losses(forward, data)
    assert torch.equal(window_losses(forward, data, [0.0] * 3), plain) and not torch.equal(window_losses(forward, data, betas), plain)


def test_sparsegpt_does_not_take_another_score_for_attention(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="prunes experts only"):
        prune_checkpoint(dense, tmp_path / "out", tokens(), method="sparsegpt", targets="experts+attn")


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_scores_of_attention_are_as_wide_as_their_sums(compute: torch.dtype) -> None:
    """In eight bits most of a row would tie, and the sums of a long calibration are beyond float16."""
    g = torch.Generator().manual_seed(0)
    weight, sums = torch.randn(16, 256, generator=g).to(compute), 1e5 * torch.rand(256, generator=g)
    order = (weight.double().abs() * sums.double().sqrt()).sort(dim=1, stable=True).indices[:, :128]
    expected = torch.ones(16, 256, dtype=torch.bool).scatter(1, order, False)
    assert torch.equal(Wanda(Wanda.Options(name="wanda")).linear_mask(weight, sums, Pattern(0.5), Key()), expected)
