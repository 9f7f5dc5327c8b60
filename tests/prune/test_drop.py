"""Whole experts: NAEE, REAP, EAN, frequency, and the router-load score."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_layer import routing
from prune_layer import tokens as inputs
from prune_model import digest, save, tokens

from xutrain.engine.workers import Workers
from xutrain.errors import RecipeError, Stopped
from xutrain.methods.prune.base import Routing
from xutrain.methods.prune.drop import LayerView, drop_experts, largest
from xutrain.methods.prune.load_balance import coefficient_of_variation, loads
from xutrain.methods.prune.measure import open_forward, window_losses
from xutrain.methods.prune.naee import NAEE, combine
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source

METHODS = ["naee", "reap", "ean", "frequency"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drop") / "dense"
    save("mixtral", folder, num_hidden_layers=2)
    return folder


def test_load_score_limits() -> None:
    assert coefficient_of_variation(torch.full((8,), 5)) == 0
    assert coefficient_of_variation(torch.tensor([9, *[0] * 7])) == pytest.approx(math.sqrt(7))
    r = routing(inputs())
    counted = loads(r)
    assert int(counted["top1"].sum()) == 64 and int(counted["topk"].sum()) == 128


def test_largest_breaks_ties_by_index() -> None:
    assert largest(torch.tensor([1.0, 3.0, 1.0, 0.0]), 2) == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_checkpoint_that_transformers_loads(dense: Path, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    report = drop_experts(dense, tmp_path / "out", tokens(), method={"name": method, "keep": 3})
    a, b = Source(dense), Source(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == 3 and model.model.layers[0].mlp.gate.weight.shape == (3, 32)
    for layer, row in enumerate(report.layers):
        at = f"model.layers.{layer}.block_sparse_moe."
        for new, old in enumerate(row["kept"]):
            assert torch.equal(b.read(f"{at}experts.{new}.w2.weight"), a.read(f"{at}experts.{old}.w2.weight"))
        assert torch.equal(b.read(f"{at}gate.weight"), a.read(f"{at}gate.weight")[row["kept"]])
    data = tokens(2, 16, seed=4)
    with torch.no_grad():
        theirs = model.float()(data, labels=data).loss
    ours = window_losses(open_forward(tmp_path / "out"), data).mean()
    assert float(ours) == pytest.approx(float(theirs), rel=2e-2)  # its rotary table is bfloat16 after .float()


def test_keeping_all_experts_changes_nothing(dense: Path, tmp_path: Path) -> None:
    drop_experts(dense, tmp_path / "out", tokens(), method={"name": "naee", "keep": 4})
    assert digest(tmp_path / "out").values() != [] and all(
        torch.equal(Source(tmp_path / "out").read(n), Source(dense).read(n)) for n in Source(dense).entries
    )


def test_naee_is_exhaustive_and_the_smaller_layer_computes_the_masked_one(dense: Path) -> None:
    forward = open_forward(dense, compute=torch.float64)
    layer, hidden = forward.load(0), forward.embed(tokens())
    with torch.no_grad():
        x = forward.attend(layer, hidden)
        method = NAEE(NAEE.Options(name="naee", keep=2))
        view = LayerView(forward, layer, 0, x, forward.route(layer, x))
        losses = method.losses(view)
        assert len(losses) == 6 and method.choose(view) == list(min(losses, key=losses.__getitem__))
        full = NAEE(NAEE.Options(name="naee", keep=4)).losses(view)
        assert full == {(0, 1, 2, 3): 0.0}
        outputs = torch.stack([forward.read(0, e)(x) for e in range(4)], 1)
        whole = combine(outputs, view.routing)
        for kept in itertools.combinations(range(4), 2):
            masked = forward.route(layer, x, list(kept))
            assert set(masked.index.unique().tolist()) <= set(kept)
            error = float((whole - combine(outputs, masked)).norm())
            assert error == pytest.approx(losses[kept], rel=1e-9)
            small = layer.block.gate(x)[:, list(kept)].softmax(-1)
            weight, index = small.topk(2, -1)
            physical = combine(outputs[:, list(kept)], Routing(index, weight / weight.sum(-1, keepdim=True), small))
            torch.testing.assert_close(physical, combine(outputs, masked), rtol=1e-4, atol=1e-5)  # the router works in float32


def _ranked(dense: Path, out: Path, method: str) -> None:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    drop_experts(dense, out, tokens(), method={"name": method, "keep": 3}, batch=2, workers=Workers(count, rank, count))


@pytest.mark.parametrize("method", ["naee", "reap"])
def test_resumed_and_on_two_processes_the_same_files(dense: Path, tmp_path: Path, forked: Any, method: str) -> None:
    drop_experts(dense, tmp_path / "one", tokens(), method={"name": method, "keep": 3}, batch=2)
    forked(_ranked, 2, dense, tmp_path / "two", method)
    with pytest.raises(Stopped):
        drop_experts(dense, tmp_path / "parts", tokens(), method={"name": method, "keep": 3}, batch=2, progress=lambda done, total: True)
    drop_experts(dense, tmp_path / "parts", tokens(), method={"name": method, "keep": 3}, batch=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") == digest(tmp_path / "parts")


def test_what_cannot_be_dropped(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keep"):
        drop_experts(dense, tmp_path / "out", tokens(), method={"name": "reap", "keep": 1})
    save("llama", tmp_path / "llama", num_hidden_layers=1)
    with pytest.raises(RecipeError, match="no experts"):
        drop_experts(tmp_path / "llama", tmp_path / "out", tokens(), method={"name": "reap", "keep": 2})
    with pytest.raises(RecipeError, match="prunes weights"):
        drop_experts(dense, tmp_path / "out", tokens(), method={"name": "wanda"})


def test_a_number_of_experts_that_the_config_leaves_to_the_default_is_written(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense", num_hidden_layers=1, num_local_experts=8)
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "num_local_experts"}))
    drop_experts(tmp_path / "dense", tmp_path / "out", tokens(2), method={"name": "frequency", "keep": 6})
    assert Architecture.read(tmp_path / "out").experts == 6
