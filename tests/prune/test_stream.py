"""From a real sharded checkpoint to a real sharded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import CONFIGS, digest, reference, save, tokens

from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.masks import Pattern
from xutrain.models.decoder import Decoder
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("mixtral") / "dense"
    return folder, save("mixtral", folder)


def test_the_fixture_is_several_shards_of_bf16(mixtral: tuple[Path, Any]) -> None:
    source = Source(mixtral[0])
    assert len(source.headers) > 3 and {e.dtype for e in source.entries.values()} == {"BF16"}


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_our_layers_compute_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = save(kind, tmp_path, dtype=torch.float32)
    ours = Decoder(Architecture.read(tmp_path))
    ours.load(Source(tmp_path))
    data = tokens(3, 20)
    with torch.no_grad():
        theirs = model(data).logits
        torch.testing.assert_close(ours(data), theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_streamed_equals_whole_model_and_transformers_loads_it(mixtral: tuple[Path, Any], tmp_path: Path, pattern: str) -> None:
    from transformers import AutoModelForCausalLM

    folder, model = mixtral
    before = digest(folder)
    report = prune_checkpoint(folder, tmp_path / "out", tokens(), pattern=pattern, compute=torch.float64)
    assert digest(folder) == before
    expected = reference(folder, tokens(), Pattern.parse(pattern, 0.5))
    dense, pruned = Source(folder), Source(tmp_path / "out")
    assert pruned.headers == dense.headers
    for name, entry in dense.entries.items():
        stored = pruned.read(name)
        assert torch.equal(stored, expected.get(name, dense.read(name))), name
        assert stored.shape == entry.shape
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for i, layer in enumerate(whole.model.layers):
            at = f"model.layers.{i}.block_sparse_moe.experts."
            for e in range(4):
                layer.mlp.experts.gate_up_proj[e] = torch.cat([expected[f"{at}{e}.w1.weight"], expected[f"{at}{e}.w3.weight"]])
                layer.mlp.experts.down_proj[e] = expected[f"{at}{e}.w2.weight"]
        data = tokens(2, 16, seed=5)
        assert torch.equal(loaded(data).logits, whole(data).logits)
        assert not torch.equal(loaded(data).logits, model(data).logits)
    assert report.sparsity == pytest.approx(0.5) and not report.fallbacks and 0 < report.error < 1
    assert len(report.experts) == 12 and json.loads((tmp_path / "out" / "pruning.json").read_text())["pattern"] == pattern


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_family_is_pruned_where_it_should_be_and_nowhere_else(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(kind, tmp_path / "dense")
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", tokens())
    arch, dense, pruned = Architecture.read(tmp_path / "dense"), Source(tmp_path / "dense"), Source(tmp_path / "out")
    names = {n for layer in range(arch.layers) for n in arch.expert_names(layer)}
    assert len(names) == {"mixtral": 36, "qwen2_moe": 36, "olmoe": 72, "deepseek_v2": 48, "llama": 9}[kind]
    for name in dense.entries:
        a, b = dense.read(name), pruned.read(name)
        if name in names:
            assert torch.equal((b != 0).sum(1), torch.full((len(b),), b.shape[1] - b.shape[1] // 2)) and torch.equal(b[b != 0], a[b != 0])
        else:
            assert torch.equal(a, b), name
    assert len(report.layers) == len(arch.pruned_layers)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens(1, 8)).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("method", ["moe_pruner", "path", "sparsegpt"])
def test_bfloat16_forward_pass(mixtral: tuple[Path, Any], tmp_path: Path, method: str) -> None:
    exact = prune_checkpoint(mixtral[0], tmp_path / "exact", tokens(), method=method, rescale=True)
    report = prune_checkpoint(mixtral[0], tmp_path / "out", tokens(), method=method, compute=torch.bfloat16, rescale=True)
    assert report.sparsity == pytest.approx(0.5, abs=0.03) and report.error == pytest.approx(exact.error, rel=0.1)


def test_kept_weights_are_the_files_own_whatever_the_compute_dtype(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense", dtype=torch.float32)
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", tokens(), compute=torch.bfloat16)
    arch, before, after = Architecture.read(tmp_path / "dense"), Source(tmp_path / "dense"), Source(tmp_path / "out")
    for name in (n for layer in range(arch.layers) for n in arch.expert_names(layer)):
        old, new = before.read(name), after.read(name)
        assert torch.equal(new[new != 0], old[new != 0]) and float((new == 0).float().mean()) == pytest.approx(0.5)
