"""Text: windows that depend on (seed, step, worker) alone, byte pairs, prepared token arrays, the vocabulary of GPT-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xutrain.data import bpe, text_files
from xutrain.data.prepare import prepare, verify
from xutrain.engine.rng import Key
from xutrain.errors import DataError
from xutrain.recipe import resolve

PROSE = "the cat sat on the mat and the rat sat on the cat. " * 40


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XUTRAIN_DATA", str(tmp_path / "data"))


def task(name: str = "text", **options: Any) -> Any:
    part, chosen = resolve.options("dataset", name, options, verb="pretrain")
    return part.build(chosen, 0)


def test_the_language_reference_is_always_there() -> None:
    found = task(context=32)
    assert found.vocabulary == 256 and len(found.splits["train"]) > 300_000 and len(found.splits["val"]) > 20_000
    batch = found.draw(3, 1, 4, 5, seed=0)
    assert batch.inputs.shape == batch.targets.shape == (5, 32)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    again = task(context=32).draw(3, 1, 4, 5, seed=0)
    assert torch.equal(batch.inputs, again.inputs)
    for other in (found.draw(3, 2, 4, 5, 0), found.draw(4, 1, 4, 5, 0), found.draw(3, 1, 4, 5, 1)):
        assert not torch.equal(batch.inputs, other.inputs)


def test_validation_windows_are_fixed_and_do_not_overlap() -> None:
    found = task(context=64, val_windows=50)
    windows = torch.cat([b.inputs for b in found.batches("val", 16)])
    assert windows.shape == (50, 64)
    assert bool((np.diff(found._val) >= 64).all())
    few = task(context=64, val_windows=10**6)
    assert len(few._val) == (len(few.splits["val"]) - 1) // 64


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert task().named_scores("val", {"loss": 2.0}) == {"val_loss": 2.0, "perplexity": pytest.approx(np.exp(2.0))}


@pytest.mark.parametrize("text", ["", "a", "aaaaaaa", "abababab", PROSE, "Ünïcødé " * 9, "aaabaaab" * 5 + "aa"])
def test_byte_pairs_undo_themselves(text: str) -> None:
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    merges = bpe.train(data, 300)
    tokens = bpe.encode(data, merges)
    assert bpe.decode(tokens, merges) == text.encode()
    other = np.frombuffer(b"a rat; aaaa \xff\x00 the mat", dtype=np.uint8)
    assert bpe.decode(bpe.encode(other, merges), merges) == other.tobytes()


def test_byte_pairs_take_the_most_frequent_pair_first() -> None:
    merges = bpe.train(np.frombuffer(b"xyxyxyabab", dtype=np.uint8), 257)
    assert merges.tolist() == [[ord("x"), ord("y")]]
    assert bpe.encode(np.frombuffer(b"aaaaa", dtype=np.uint8), np.array([[97, 97]])).tolist() == [256, 256, 97]


def test_learnt_pairs_are_kept_for_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    from pydoc_data.topics import topics

    for i, name in enumerate(sorted(topics)[:12]):
        (tmp_path / "texts" / f"{i}.txt").write_text(topics[name][:3000])
    options = {"path": str(tmp_path / "texts"), "tokenizer": "bpe", "vocabulary": 300, "context": 16}
    first = task(**options)
    kept = [p.name for p in (tmp_path / "data").iterdir() if p.is_dir()]
    assert len(kept) == 1 and kept[0].startswith("text-bpe300-")
    assert np.array_equal(first.splits["train"], task(**options).splits["train"])
    assert first.vocabulary == 300 and int(first.splits["train"].max()) < 300
    assert len(first.splits["train"]) < 0.8 * sum(f.stat().st_size for f in (tmp_path / "texts").iterdir())


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text there"):
        task(path=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no text there"):
        task(path=str(tmp_path / "nowhere"))


def test_both_splits_get_a_document(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 40)
    for fraction in (0.001, 0.5, 0.999):
        found = task(path=str(tmp_path), context=8, val_fraction=fraction)
        assert sum(len(s) for s in found.splits.values()) == 122 or fraction == 0.5
        assert min(len(s) for s in found.splits.values()) >= 40


def _vocabulary(folder: Path, special: tuple[str, ...] = ("<|endoftext|>",)) -> None:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([PROSE], vocab_size=300, special_tokens=list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))


def test_documents_become_a_prepared_token_array(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    _vocabulary(folder)
    (folder / "a.txt").write_text("the cat sat")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"the rat {i} and the mat"}) + "\n" for i in range(60)))
    done = prepare("text_folder", folder)
    assert done["status"] == "ready"
    assert verify("text_folder")["status"] == "ok"
    found = task("tokens", prepared="text_folder", context=4)
    assert 256 < found.vocabulary <= 300 and len(found.splits["train"]) > 200
    assert prepare("text_folder", folder)["status"] == "was ready"


def test_a_line_without_text_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    _vocabulary(folder)
    for wrong in ('{"body": "no"}', '{"text": null}', '{"text": 3}', '["text"]', "{"):
        (folder / "b.jsonl").write_text('{"text": "fine"}\n' + wrong + "\n")
        with pytest.raises(DataError, match=r"b.jsonl:2"):
            prepare("text_folder", folder)
    (folder / "b.jsonl").write_text('{"text": "the cat"}\n\n{"text": "the rat"}\n\n')  # empty lines are no documents
    assert list(text_files.documents([folder / "b.jsonl"])) == ["the cat", "the rat"]


def test_a_vocabulary_lies_beside_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _vocabulary(tmp_path / "mine")
    (tmp_path / "mine" / "a.txt").write_text(PROSE)
    found = task(path="~/mine/a.txt", tokenizer="gpt2", context=4)
    assert 256 < found.vocabulary <= 300 and max(int(s.max()) for s in found.splits.values()) < found.vocabulary


def test_vocabularies_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("the cat")
    _vocabulary(tmp_path / "mine", special=())
    with pytest.raises(DataError, match="endoftext"):
        prepare("text_folder", tmp_path / "mine")
    (tmp_path / "mine" / "vocab.json").write_text("{")
    with pytest.raises(DataError, match="no vocabulary of byte pairs"):
        task(path=str(tmp_path / "mine"), tokenizer="gpt2", context=4)


def test_a_token_that_the_first_look_missed_is_named_when_it_is_drawn(tmp_path: Path) -> None:
    """A file is looked at here and there before a run; what is drawn is looked at as well."""
    tokens = (np.arange(3_000_000) % 200).astype(np.uint16)
    tokens[:100].tofile(tmp_path / "val.bin")
    tokens[9000] = 250  # a look takes 256 blocks of 4096
    tokens.tofile(tmp_path / "train.bin")
    found = task("tokens", path=str(tmp_path), vocabulary=250, context=4)
    assert found.batch(torch.tensor([2000]), Key()).inputs.shape == (1, 4)
    with pytest.raises(DataError, match="beyond the vocabulary of 250"):
        found.batch(torch.tensor([2250]), Key())
    tokens[-1] = 251
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"beyond the vocabulary of 250 \(got 251\)"):
        task("tokens", path=str(tmp_path), vocabulary=250, context=4)


def test_without_a_vocabulary_the_way_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("the cat")
    with pytest.raises(DataError, match="gpt2_bpe"):
        prepare("text_folder", tmp_path / "mine")
    with pytest.raises(DataError, match="gpt2_bpe"):
        task(tokenizer="gpt2")
    _vocabulary(tmp_path / "small")
    with pytest.raises(DataError, match="50257 tokens"):
        prepare("gpt2_bpe", tmp_path / "small")


def test_files_of_nanogpt_stay_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "owt"
    folder.mkdir()
    for split, count in (("train", 5000), ("val", 600)):
        (np.arange(count) % 50257).astype(np.uint16).tofile(folder / f"{split}.bin")
    prepare("openwebtext", folder)
    found = task("tokens", prepared="openwebtext", context=100)
    assert found.vocabulary == text_files.GPT2_TOKENS and len(found.splits["train"]) == 5000
    (folder / "val.bin").write_bytes(b"\x00")
    with pytest.raises(DataError, match="cut short"):
        task("tokens", prepared="openwebtext", context=100)
