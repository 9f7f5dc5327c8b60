"""Bad input: named errors, and the input checkpoint is never touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import digest, save, tokens

from xutrain.engine.rng import Key
from xutrain.errors import DataError, Failed, RecipeError, UsageError
from xutrain.methods.prune import journal
from xutrain.methods.prune.base import ROLES, Expert, Routing, magnitude_cut
from xutrain.methods.prune.checkpoint import prune_checkpoint, weight_method
from xutrain.methods.prune.expert import prune_expert
from xutrain.methods.prune.masks import Pattern
from xutrain.models.moe import FAMILIES
from xutrain.models.shards import INDEX, Source, Target, header_of


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "clean"
    save("mixtral", folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def dense(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "dense"))


def config(folder: Path, **change: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_unknown_architecture_names_the_supported_ones(dense: Path, tmp_path: Path) -> None:
    config(dense, model_type="gpt_bigcode")
    with pytest.raises(DataError, match="gpt_bigcode") as caught:
        prune_checkpoint(dense, tmp_path / "out", tokens())
    assert all(name in str(caught.value) for name in FAMILIES)


def test_missing_truncated_and_malformed_shards(dense: Path, tmp_path: Path) -> None:
    whole = shards(dense)[1].read_bytes()
    for broken, words in (
        (whole[:-7], "truncated: "),
        (whole[:4], "no header"),
        (whole[:40], "inside its header"),
        (b"\x10" + bytes(7) + b"not json at all!", "not a safetensors"),
    ):
        shards(dense)[1].write_bytes(broken)
        with pytest.raises(DataError, match=words):
            prune_checkpoint(dense, tmp_path / "out", tokens())
    name = shards(dense)[1].name
    shards(dense)[1].unlink()
    with pytest.raises(DataError, match=f"{name}: shard is missing"):
        prune_checkpoint(dense, tmp_path / "out", tokens())
    assert not (tmp_path / "out").exists()


def test_index_that_names_a_missing_tensor(dense: Path, tmp_path: Path) -> None:
    index = json.loads((dense / INDEX).read_text())
    index["weight_map"]["model.layers.9.ghost.weight"] = shards(dense)[0].name
    (dense / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="ghost"):
        prune_checkpoint(dense, tmp_path / "out", tokens())


def test_config_of_another_model(dense: Path, tmp_path: Path) -> None:
    config(dense, num_local_experts=5)
    with pytest.raises(DataError, match=r"experts\.4\.w1.*missing"):
        prune_checkpoint(dense, tmp_path / "out", tokens())
    config(dense, num_experts_per_tok=9)
    with pytest.raises(DataError, match="exceeds"):
        prune_checkpoint(dense, tmp_path / "out", tokens())
    (dense / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json"):
        prune_checkpoint(dense, tmp_path / "out", tokens())
    with pytest.raises(DataError, match=r"config\.json|checkpoint folder"):
        prune_checkpoint(tmp_path / "nowhere", tmp_path / "out", tokens())


def test_output_on_top_of_the_input(dense: Path, tmp_path: Path) -> None:
    before = digest(dense)
    (tmp_path / "link").symlink_to(dense)
    for out in (dense, dense / "pruned", tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="input checkpoint"):
            prune_checkpoint(dense, out, tokens())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        prune_checkpoint(dense, tmp_path / "full", tokens())
    assert digest(dense) == before and os.listdir(tmp_path / "full") == ["thesis.tex"]


def test_bad_patterns_and_tokens(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a multiple of 5"):
        prune_checkpoint(dense, tmp_path / "out", tokens(), pattern="2:5")
    with pytest.raises(DataError, match=r"0\.\.95"):
        prune_checkpoint(dense, tmp_path / "out", tokens(vocab=200))
    with pytest.raises(DataError, match="two tokens"):
        prune_checkpoint(dense, tmp_path / "out", tokens(length=1))
    with pytest.raises(RecipeError, match="moe_pruner"):
        prune_checkpoint(dense, tmp_path / "out", tokens(), method="moe_prunner")
    assert not (tmp_path / "out").exists()


def test_few_tokens_fall_back_to_magnitude_by_name(dense: Path, tmp_path: Path) -> None:
    report = prune_checkpoint(dense, tmp_path / "out", tokens(), method={"name": "moe_pruner", "min_tokens": 10**6})
    assert len(report.fallbacks) == 4 and "expert 3" in report.fallbacks[3]
    magnitude = prune_checkpoint(dense, tmp_path / "magnitude", tokens(), method={"name": "magnitude", "group": "row"})
    assert digest(report.folder) == digest(magnitude.folder)


@pytest.mark.parametrize("name", ["moe_pruner", "path", "sparsegpt"])
def test_router_weights_whose_squares_vanish_fall_back_too(name: str) -> None:
    method = weight_method({"name": name, "gate": "square"})
    torch.manual_seed(0)
    e, x = Expert(torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)), torch.randn(40, 8)
    routing = Routing(torch.tensor([[0, 1]] * 40), torch.tensor([[1 - 1e-12, 1e-12]] * 40), torch.tensor([[1 - 1e-12, 1e-12]] * 40))
    done = prune_expert(method, e, Expert(*(e.matrix(r).clone() for r in ROLES)), x, routing, (0, 1), Pattern(0.5), Key())
    assert done.row.fallback and all(torch.equal(done.masks[r], magnitude_cut(e, Pattern(0.5)).masks[r]) for r in ("gate", "down"))


@pytest.mark.parametrize("method", ["moe_pruner", "wanda", "path", "sparsegpt"])
def test_an_expert_without_tokens_never_loses_its_first_columns(dense: Path, tmp_path: Path, method: str) -> None:
    source = Source(dense)
    target = Target(tmp_path / "dead", source.headers)
    target.create()
    for name in source.entries:
        value = source.read(name)
        if name.endswith("gate.weight"):
            value = torch.cat([value[:3], torch.zeros_like(value[:1])])
            value[:3] += 0.0
            value[3] = -(value[0] + value[1] + value[2]) * 50  # far below the others for these tokens
        target.write(name, value)
    target.sync()
    target.write_index()
    shutil.copy(dense / "config.json", tmp_path / "dead" / "config.json")
    one = tokens(1, 2)
    report = prune_checkpoint(tmp_path / "dead", tmp_path / "out", one, method=method)
    dead = [r for r in report.experts if r["tokens"] == 0]
    assert dead and all(r["fallback"] and r["error"] is None for r in dead)
    for row in dead:
        w = Source(tmp_path / "out").read(f"model.layers.0.block_sparse_moe.experts.{row['expert']}.w1.weight")
        assert w[:, : w.shape[1] // 2].any()
        assert ((w != 0).sum(1) == w.shape[1] // 2).all()


def test_activations_that_are_not_finite_name_the_expert(dense: Path, tmp_path: Path) -> None:
    source = Source(dense)
    target = Target(tmp_path / "nan", source.headers)
    target.create()
    for name in source.entries:
        value = source.read(name)
        target.write(name, torch.full_like(value, float("nan")) if "experts.2.w1" in name else value)
    target.sync()
    target.write_index()
    shutil.copy(dense / "config.json", tmp_path / "nan" / "config.json")
    with pytest.raises(DataError, match=r"layers\.0\.block_sparse_moe\.experts\.2"):
        prune_checkpoint(tmp_path / "nan", tmp_path / "out", tokens())


def test_a_full_disk_says_how_much_is_needed(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(dense)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Failed, match="disk is full; the pruned checkpoint needs"):
        prune_checkpoint(dense, tmp_path / "out", tokens())
    monkeypatch.undo()
    assert not (tmp_path / "out" / INDEX).exists() and digest(dense) == before
    prune_checkpoint(dense, tmp_path / "out", tokens())  # the same command goes on
    assert not (tmp_path / "out" / journal.WORK).exists()


def test_header_of_reads_back(tmp_path: Path) -> None:
    tensors = {"a": ("F32", (2, 3)), "b": ("BF16", (0, 4)), "c": ("I64", (1,))}
    target = Target(tmp_path, {"model.safetensors": header_of(tensors)})
    target.create()
    target.write("a", torch.arange(6.0).view(2, 3))
    target.write("b", torch.zeros(0, 4))
    target.write("c", torch.tensor([7]))
    target.close()
    from safetensors.torch import load_file

    found = load_file(tmp_path / "model.safetensors")
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].shape == (0, 4) and int(found["c"][0]) == 7
