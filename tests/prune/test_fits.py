"""Checkpoints that do not hold what their config.json promises, or hold what no number can be made of: found before any work."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import digest, save, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from xutrain.errors import DataError
from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.drop import drop_experts
from xutrain.models.moe import Architecture
from xutrain.models.shards import INDEX, SINGLE

W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fits") / "clean"
    save("mixtral", folder, dtype=torch.float32, shards="1GB", num_hidden_layers=2)
    return folder


@pytest.fixture
def dense(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "dense"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    found = load_file(folder / SINGLE)
    change(found)
    save_file(found, folder / SINGLE, metadata={"format": "pt"})


def config(folder: Path, **change: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def refused(folder: Path, out: Path, words: str, **options: Any) -> None:
    with pytest.raises(DataError, match=words):
        prune_checkpoint(folder, out, tokens(), **options)
    assert not out.exists()


@pytest.mark.parametrize(
    "name",
    [EMBED, "lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.gate.weight"],
)
def test_a_missing_tensor_of_any_kind_is_found_at_once(dense: Path, tmp_path: Path, name: str) -> None:
    edit(dense, lambda t: t.pop(name))
    refused(dense, tmp_path / "out", f"{name}.*missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({W2: t[W2].T.contiguous()}), r"experts\.3\.w2.*has shape"),
        (lambda t: t.update({W2: t[W2].to(torch.int8)}), "not stored as a float"),
        (lambda t: t.update({W2: t[W2].to(torch.float8_e4m3fn)}), "not stored as a float"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": t["model.norm.weight"].clone()}), "beyond the 2 layers"),
    ],
)
def test_tensors_that_config_json_does_not_describe(dense: Path, tmp_path: Path, change: Any, words: str) -> None:
    edit(dense, change)
    refused(dense, tmp_path / "out", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 16}, "embed_tokens.*has shape"),
        ({"num_attention_heads": 2}, "_proj.*has shape"),
        ({"num_attention_heads": "four"}, "transformers refuses it"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "transformers refuses it"),
        ({"vocab_size": 97}, "embed_tokens.*has shape"),
        ({"num_hidden_layers": 1}, "beyond the 1 layers"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"model_type": ["mixtral"]}, "not supported"),
    ],
)
def test_a_config_of_another_model(dense: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config(dense, **change)
    refused(dense, tmp_path / "out", words)


def test_models_whose_experts_are_no_plain_swiglu_or_that_have_none() -> None:
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    Architecture.of(llama)
    with pytest.raises(DataError, match="biases"):
        Architecture.of({**llama, "mlp_bias": True})
    with pytest.raises(DataError, match="none of the 2 layers has experts"):
        moe = {"moe_intermediate_size": 4, "num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [0, 1]}
        Architecture.of({**llama, **moe, "model_type": "qwen2_moe"})
    with pytest.raises(DataError, match="mapping"):
        Architecture.of([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["moe_pruner", "magnitude", "random", "sparsegpt", "reap", "naee"])
@pytest.mark.parametrize("where", [W2, EMBED])
def test_one_weight_that_is_not_finite_is_named_by_every_method(dense: Path, tmp_path: Path, method: str, where: str) -> None:
    """A sort would take it for a large or a small score and go on."""
    edit(dense, lambda t: t[where].view(-1)[int(tokens()[0, 0]) * 32 : int(tokens()[0, 0]) * 32 + 1].fill_(float("nan")))
    run: Any = drop_experts if method in ("reap", "naee") else prune_checkpoint
    with pytest.raises(DataError, match=W2 if where == W2 else r"model\.layers\.0: hidden states are not finite"):
        run(dense, tmp_path / "out", tokens(), method={"name": method, **({"keep": 3} if run is drop_experts else {})})


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + length])
    new = json.dumps(change(table) or table).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [1, 2],
        lambda t: t[W2].update(shape=[32, 47]),
        lambda t: t[W2].update(shape=None),
        lambda t: t[W2].update(data_offsets=t[W2]["data_offsets"][::-1]),
        lambda t: t[W2].update(data_offsets=[-9, 5]),
    ],
)
def test_headers_that_make_no_sense(dense: Path, tmp_path: Path, change: Any) -> None:
    header(dense, change)
    refused(dense, tmp_path / "out", "is not a safetensors file")


def test_an_index_cannot_lead_the_output_over_other_files(dense: Path, tmp_path: Path) -> None:
    """The output has the shards' names; joined to its folder, an absolute name would be the input itself."""
    before, names = digest(dense), load_file(dense / SINGLE)
    for place in (str(dense / SINGLE), f"../dense/{SINGLE}", f"sub/{SINGLE}", ".."):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        shutil.copy(dense / "config.json", other)
        (other / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
        refused(other, tmp_path / "out", "outside the checkpoint folder")
    for broken in ({"weight_map": [1]}, {"weight_map": {}}, []):
        (other / INDEX).write_text(json.dumps(broken))
        refused(other, tmp_path / "out", "index")
    assert digest(dense) == before
