"""`xutrain prune` on a checkpoint of the user's: its own tokens, its own files, and what is found out before hours of work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import save

from xutrain.errors import DataError
from xutrain.launch.plan import plan
from xutrain.launch.run import launch
from xutrain.loops import pruning
from xutrain.methods.prune.measure import layer_errors, open_forward
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source
from xutrain.recipe.load import load

SMALL = ["calibration={samples: 5, length: 16}", "evaluation={length: 16, windows: 3}"]


def tokenizer(folder: Path) -> Any:
    """A word-level tokenizer of 96 tokens, as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "the", "a", "to", "of", "is", "in", "object"]
    words += [f"w{i}" for i in range(96 - len(words))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    made.save_pretrained(folder)
    return made


def recipe(folder: Path, *more: str) -> Any:
    return load("moe_pruner", "prune", [f"model.path={folder}", *SMALL, *more])


def go(folder: Path, runs: Path, *more: str) -> dict[str, Any]:
    return launch(plan(recipe(folder, *more), out=runs, verbosity=-1))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "dense"
    save("qwen2_moe", folder, num_hidden_layers=2, mlp_only_layers=[0])
    tokenizer(folder)
    return folder


def test_the_embedded_text_is_read_with_the_models_own_tokenizer(own: Path, tmp_path: Path) -> None:
    """Bytes would be token ids of something else: numbers without meaning, and no error."""
    loaded = recipe(own).recipe
    text = pruning.embedded_tokens(loaded, own, "val")
    assert int(text.max()) < 96 and float((text == 1).float().mean()) > 0.02  # "the" is a common word
    assert pruning.text_windows(loaded, "embedded", own).tolist() == text[: 3 * 16].view(3, 16).tolist()
    assert set(pruning.calibration(loaded, own).flatten().tolist()) <= set(range(96))
    save("mixtral", tmp_path / "bare", num_hidden_layers=1)
    with pytest.raises(DataError, match="no usable tokenizer"):
        pruning.calibration(recipe(tmp_path / "bare").recipe, tmp_path / "bare")
    save("mixtral", tmp_path / "bytes", num_hidden_layers=1, vocab_size=256)
    assert len(pruning.embedded_tokens(recipe(tmp_path / "bytes").recipe, tmp_path / "bytes", "val")) > 20_000


def test_a_distilled_checkpoint_has_the_files_dtypes_and_shards_of_its_model(own: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = go(own, tmp_path, "distill={steps: 2, length: 8, batch_size: 2}")
    assert result["status"] == "done"
    folder = Path(result["run"])
    a, b = Source(own), Source(folder / "distilled")
    assert a.headers == b.headers and {f.name for f in own.iterdir()} | {"config.json"} == {
        f.name for f in (folder / "distilled").iterdir()
    }
    assert AutoTokenizer.from_pretrained(folder / "distilled")("the object")["input_ids"] == [1, 7]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "distilled")(torch.tensor([[1, 2, 3]])).logits
    assert bool(torch.isfinite(logits).all())
    pruned = Source(folder / "pruned")
    for name in pruned.entries:
        if ".experts." in name:
            assert not b.read(name)[pruned.read(name) == 0].any()
    assert any(not torch.equal(pruned.read(n), b.read(n)) for n in pruned.entries)


def test_a_dense_model_is_distilled_too(tmp_path: Path) -> None:
    save("llama", tmp_path / "llama", num_hidden_layers=1, vocab_size=256, tie_word_embeddings=True)
    result = go(tmp_path / "llama", tmp_path / "runs", "distill={steps: 2, length: 8, batch_size: 2}", "log.every=1")
    losses = [line for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines() if "expert_loss" in line]
    assert result["status"] == "done" and losses and all('"value":0.0' not in line.replace(" ", "") for line in losses)


def test_layer_error_where_an_expert_gets_no_token(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense", num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=1)
    forward = open_forward(tmp_path / "dense")
    assert layer_errors(forward, forward, torch.tensor([[3, 4]])) == [0.0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["evaluation.skipping=true"], "this one has 3"),
        (["evaluation.tasks=[piqa]"], "lm-eval is not installed"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_pruning(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = go(own, tmp_path, *more)
    assert result["status"] == "failed" and words in str(result), result
    assert not list(tmp_path.rglob("pruned"))


def test_a_sliding_window_is_checked_for_every_length(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense", num_hidden_layers=1, vocab_size=256, sliding_window=20)
    arch = Architecture.read(tmp_path / "dense")
    pruning.check(recipe(tmp_path / "dense").recipe, arch)
    for more in ("calibration.length=24", "evaluation.length=24", "distill={steps: 1, length: 24}"):
        with pytest.raises(DataError, match=r"length: exceeds the model's sliding window of 20"):
            pruning.check(recipe(tmp_path / "dense", more).recipe, arch)
