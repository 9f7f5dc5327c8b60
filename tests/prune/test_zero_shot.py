"""lm-eval on a pruned checkpoint, with a task of our own that needs no download; skipped where lm-eval is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from prune_model import save, tokens

from xutrain.errors import DataError
from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.zero_shot import zero_shot

TASK = """
task: parity_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" even", " odd"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def with_tokenizer(folder: Path) -> None:
    """A byte tokenizer beside the weights, as transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"xutrain\[eval\]"):
        zero_shot(tmp_path, ["piqa"], "cpu")


@pytest.mark.slow
def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'xutrain[eval]'")
    with pytest.raises(DataError, match="no such task"):
        zero_shot(tmp_path, ["parity_huge"], "cpu")


def test_a_local_task_on_a_pruned_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'xutrain[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [json.dumps({"question": f"The number {i} is", "answer": i % 2}) for i in range(8)]
    (tasks / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tasks / "parity.yaml").write_text(TASK.format(file=tasks / "data.jsonl"), encoding="utf-8")
    save("mixtral", tmp_path / "dense", vocab_size=300)
    with_tokenizer(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", tokens())
    scores = zero_shot(tmp_path / "pruned", ["parity_tiny"], "cpu", task_folder=str(tasks))
    assert scores["accuracy"] == scores["accuracy_parity_tiny"] and scores["accuracy"] * 8 in range(9)
    assert zero_shot(tmp_path / "pruned", ["parity_tiny"], "cpu", task_folder=str(tasks), limit=1)["accuracy"] in (0.0, 1.0)
    with pytest.raises(DataError, match="no such folder"):
        zero_shot(tmp_path / "pruned", ["parity_tiny"], "cpu", task_folder=str(tmp_path / "none"))
    (tasks / "data.jsonl").unlink()
    with pytest.raises(DataError, match="lm-eval failed"):
        zero_shot(tmp_path / "pruned", ["parity_tiny"], "cpu", task_folder=str(tasks))
