"""Next-token prediction on text: windows of a token array. The array may be a memory map of any size.

A worker's batch at a step is a set of windows at uniformly random places (as nanoGPT draws them), a function of
(seed, step, worker) alone. Validation uses fixed windows, evenly spread and without overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from pydantic import Field
from torch import Tensor, nn

from xutrain.data import bpe, store, text_files
from xutrain.data.base import Batch, Task
from xutrain.engine.rng import Key
from xutrain.errors import DataError, Issue, RecipeError
from xutrain.registry import Named, dataset


class WindowOptions(Named):
    """How windows are cut."""

    context: int = Field(64, ge=2, le=1 << 20, description="tokens that the model sees at once")
    val_windows: int = Field(256, ge=1, description="validation windows, evenly spread over the held-out text")


class TextTask(Task):
    """Predict every next token of a window.

    Attributes:
        vocabulary: number of tokens.
        context: length of a window.
    """

    watched = ("val",)
    measured = ("val",)

    def __init__(self, name: str, splits: dict[str, np.ndarray], vocabulary: int, options: WindowOptions) -> None:
        self.name, self.splits, self.context = name, splits, options.context
        self.vocabulary = self.num_classes = vocabulary
        self.input_shape = (options.context,)
        for split, tokens in splits.items():
            if len(tokens) <= options.context:
                raise RecipeError(
                    Issue(
                        "data.context",
                        f"is longer than the {len(tokens)} tokens of split {split}",
                        options.context,
                        "lower it, or give more text",
                    )
                )
        self.num_train = (len(splits["train"]) - 1) // options.context
        windows = (len(splits["val"]) - 1) // options.context
        chosen = min(windows, options.val_windows)
        self._val = np.array([options.context * (i * windows // chosen) for i in range(chosen)])

    def batch(self, indices: Tensor, key: Key) -> Batch:
        return self._windows("train", indices.numpy() * self.context)

    def draw(self, step: int, worker: int, workers: int, batch_size: int, seed: int) -> Batch:
        words = Key(seed, "windows", step, worker).bits(2 * batch_size).astype(np.uint64)
        places = (words[:batch_size] << np.uint64(32) | words[batch_size:]) % np.uint64(len(self.splits["train"]) - self.context)
        return self._windows("train", places.astype(np.int64))

    def batches(self, split: str, batch_size: int = 64) -> Iterator[Batch]:
        places = self._val if split == "val" else np.arange(self.num_train) * self.context
        for at in range(0, len(places), batch_size):
            yield self._windows(split, places[at : at + batch_size])

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten())

    def score(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        total = nn.functional.cross_entropy(outputs.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum")
        return {"loss": (float(total), float(batch.targets.numel()))}

    def named_scores(self, split: str, scores: dict[str, float]) -> dict[str, float]:
        perplexity = float(np.exp(min(scores["loss"], 700.0)))
        return {f"{split}_loss": scores["loss"], "perplexity" if split == "val" else f"{split}_perplexity": perplexity}

    def _windows(self, split: str, places: np.ndarray) -> Batch:
        tokens = self.splits[split][places[:, None] + np.arange(self.context + 1)]
        if int(tokens.max()) >= self.vocabulary:
            raise _beyond(split, int(tokens.max()), self.vocabulary)
        both = torch.from_numpy(tokens.astype(np.int64))
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())


@dataset("text", summary="real text: Python's own language reference (always there), or any file or folder of text", verbs=("pretrain",))
class Text:
    """Documents of the standard library's ``pydoc_data``, or the user's; whole documents are held out."""

    class Options(WindowOptions):
        path: str | None = Field(None, description="a text file or a folder of them; null: the language reference that Python ships")
        tokenizer: Literal["bytes", "bpe", "gpt2"] = Field(
            "bytes", description="bytes; pairs learnt from the text; or GPT-2's own (prepare gpt2_bpe)"
        )
        vocabulary: int = Field(512, ge=257, le=bpe.LARGEST, description="bpe: number of tokens")
        val_fraction: float = Field(0.1, gt=0, lt=1, description="part of the documents that is held out")
        data_seed: int = Field(0, ge=0, description="which documents are held out; the run's seed does not change it")

    @staticmethod
    def build(options: Options, seed: int) -> TextTask:
        splits = _documents(options)
        name = Path(options.path).name if options.path else "pydoc_data.topics"
        if options.tokenizer == "bytes":
            return TextTask(name, {s: text_files.bytes_of(t).astype(np.uint16) for s, t in splits.items()}, bpe.BYTES, options)
        if options.tokenizer == "gpt2":
            encode, end, size = text_files.gpt2_encoder(Path(options.path).expanduser() if options.path else None)
            arrays = {s: np.array([token for t in texts for token in (*encode(t), end)], dtype=np.uint16) for s, texts in splits.items()}
            return TextTask(name, arrays, size, options)
        return TextTask(name, _learnt({s: text_files.bytes_of(t) for s, t in splits.items()}, options), options.vocabulary, options)


@dataset(
    "tokens",
    summary="a memory-mapped token file: prepared OpenWebText or text folder, or nanoGPT's train.bin and val.bin",
    verbs=("pretrain",),
)
class Tokens:
    """Token arrays on disk; nothing is read but the windows that are used."""

    class Options(WindowOptions):
        prepared: Literal["openwebtext", "text_folder"] | None = Field(
            None, description="a set made by `xutrain data prepare`; or give path"
        )
        path: str | None = Field(None, description="a folder with train.bin and val.bin (uint16 tokens without a header)")
        vocabulary: int | None = Field(None, ge=2, description="number of tokens; null: as prepared, or GPT-2's 50,257")

    @staticmethod
    def build(options: Options, seed: int) -> TextTask:
        if (options.prepared is None) == (options.path is None):
            hint = "data.prepared=openwebtext, or data.path=FOLDER"
            raise RecipeError(Issue("data", "says neither or both of prepared and path", hint=hint, has_value=False))
        splits, found = _opened(options)
        vocabulary = options.vocabulary or found
        for split, tokens in splits.items():
            _check_tokens(split, tokens, vocabulary)
        return TextTask(options.prepared or Path(str(options.path)).name, splits, vocabulary, options)


def _opened(options: Any) -> tuple[dict[str, np.ndarray], int]:
    if options.prepared is None:
        folder = Path(options.path).expanduser()
        return {s: text_files.open_bin(folder / f"{s}.bin", "") for s in ("train", "val")}, text_files.GPT2_TOKENS
    record = store.recorded(options.prepared)
    if "folder" in record:
        hint = f"xutrain data prepare {options.prepared} --source FOLDER"
        return {s: text_files.open_bin(Path(record["folder"]) / f"{s}.bin", hint) for s in ("train", "val")}, record["facts"]["vocabulary"]
    arrays = store.open_arrays(options.prepared)
    return {s: arrays[s] for s in ("train", "val")}, int(arrays["vocabulary"][0])


def _check_tokens(split: str, tokens: np.ndarray, vocabulary: int) -> None:
    """Look at up to a million tokens in blocks spread over the file: another dtype or vocabulary shows itself in a few of them.

    Blocks, since a file may be larger than memory and every place costs a read; what is drawn later is looked at again.
    """
    block, blocks = 4096, 256
    starts = np.linspace(0, len(tokens) - block, blocks).astype(np.int64) if len(tokens) > block * blocks else range(0, len(tokens), block)
    largest = max(int(tokens[at : at + block].max()) for at in starts)
    if largest >= vocabulary:
        raise _beyond(split, largest, vocabulary)


def _beyond(split: str, token: int, vocabulary: int) -> DataError:
    hint = "the file was made with another vocabulary (set data.vocabulary) or another dtype (wanted: uint16)"
    return DataError(Issue(f"token file, split {split}", f"holds a token beyond the vocabulary of {vocabulary}", token, hint))


def _documents(options: Any) -> dict[str, list[str]]:
    """Texts of the two splits, whole documents each; one single document is cut near its end."""
    if options.path is None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    else:
        path = Path(options.path).expanduser()
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix.lower() in (".txt", ".md", ".rst"))
        texts = [f.read_text(encoding="utf-8", errors="replace") for f in files if f.is_file()]
        if not texts:
            raise DataError(Issue("data.path", "no text there", options.path, "a file, or a folder with .txt, .md or .rst files"))
    if len(texts) == 1:
        cut = round(len(texts[0]) * (1 - options.val_fraction))
        return {"train": [texts[0][:cut]], "val": [texts[0][cut:]]}
    order = Key(options.data_seed, "text split").numpy().permutation(len(texts))
    held = set(order[: min(len(texts) - 1, max(1, round(options.val_fraction * len(texts))))].tolist())  # both splits get a document
    return {"train": [t for i, t in enumerate(texts) if i not in held], "val": [t for i, t in enumerate(texts) if i in held]}


def _learnt(data: dict[str, np.ndarray], options: Any) -> dict[str, np.ndarray]:
    """Both splits in byte pairs learnt from the training text; kept in the data folder for the next run."""
    digest = hashlib.sha256(data["train"].tobytes() + b"|" + data["val"].tobytes()).hexdigest()[:12]
    name, root = f"text-bpe{options.vocabulary}-{digest}", store.data_root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if not (root / name / store.CONTENT).is_file():
            merges = text_files.byte_pairs(data["train"], options.vocabulary)
            content: store.Content = {**{s: bpe.encode(d, merges) for s, d in data.items()}, "merges": merges}
            store.write(name, content, root, options.path or "pydoc_data.topics", {})
        arrays = store.open_arrays(name)
    return {s: np.asarray(arrays[s]) for s in data}
