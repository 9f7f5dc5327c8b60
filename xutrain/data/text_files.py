"""Text as token arrays: the user's folder of documents, OpenWebText, the vocabulary of GPT-2. No torch here.

Documents are ``.txt`` and ``.md`` files (a file is a document), ``.jsonl`` (one object a line, its key ``text``) and
``.parquet`` (column ``text``). A folder that holds nanoGPT's ``train.bin`` and ``val.bin`` is used where it lies.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data import archive, bpe, store
from xutrain.data.store import Content, Folder
from xutrain.engine.rng import Key
from xutrain.errors import DataError, Issue

#: part of the documents that is held out, as nanoGPT takes it from OpenWebText
HELD_OUT = {"openwebtext": 0.0005}
GPT2_TOKENS = 50257
_ENDINGS = (".txt", ".md", ".rst", ".jsonl", ".parquet")
#: what plain text is made of
_TEXT = bytes([9, 10, 13, *range(32, 127)])
_VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def read(name: str, path: Path) -> Content | Folder:
    """What ``xutrain data prepare`` stores for ``gpt2_bpe``, ``openwebtext`` or ``text_folder``.

    Raises:
        DataError: no text there, no vocabulary of GPT-2, or token files that are not whole.
    """
    if name == "gpt2_bpe":
        return _vocabulary(path)
    if (path / "train.bin").is_file():
        facts = {split: len(open_bin(path / f"{split}.bin", "")) for split in ("train", "val")}
        return Folder(path, {**facts, "vocabulary": GPT2_TOKENS})
    files = (
        [path]
        if path.is_file()
        else sorted(f for f in path.rglob("*") if f.suffix.lower() in _ENDINGS and f.name not in sum(_VOCABULARIES, ()))
    )
    if not files:
        raise DataError(Issue(str(path), "no text files", has_value=False, hint=f"wanted: files ending in {', '.join(_ENDINGS)}"))
    encode, end, size = gpt2_encoder(path)
    share = HELD_OUT.get(name, 0.05)
    with tempfile.TemporaryDirectory(dir=store.data_root()) as folder:
        counts = {"train": 0, "val": 0}
        with (Path(folder) / "train").open("wb") as train, (Path(folder) / "val").open("wb") as val:
            for i, document in enumerate(documents(files)):
                split, out = ("val", val) if Key(2357, "held out", i).words[0] < share * 2**32 or i == 0 else ("train", train)
                tokens = np.array([*encode(document), end], dtype=np.uint16)
                counts[split] += len(tokens)
                out.write(tokens.tobytes())
        if not counts["train"]:
            raise DataError(Issue(str(path), "needs at least two documents, one to hold out", counts, "split the text into several files"))
        # OpenWebText's tokens take 18 GB: they stay on disk, in a file that lives as long as the map of it
        arrays = {split: np.memmap(Path(folder) / split, dtype=np.uint16, mode="r") for split in counts}
    return {**arrays, "vocabulary": np.array([size], dtype=np.int64)}


def documents(files: list[Path]) -> Iterator[str]:
    """The documents of the files, in the files' order; empty lines are none. Raises DataError for a line or a table without text."""
    for file in files:
        if file.suffix.lower() == ".jsonl":
            with file.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _field(line, file, number)
        elif file.suffix.lower() == ".parquet":
            yield from _column(file)
        else:
            yield file.read_text(encoding="utf-8", errors="replace")


def _field(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise DataError(Issue(f"{file}:{number}", "is no JSON object whose `text` is a string", line[:60]))
    return text


def _column(file: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(Issue(str(file), "parquet files need pyarrow", has_value=False, hint="pip install pyarrow")) from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text is not None)
    except (pyarrow.ArrowException, KeyError) as reason:
        raise DataError(Issue(str(file), f"is no parquet file with a column `text`: {reason}", has_value=False)) from None


def open_bin(path: Path, hint: str) -> np.ndarray:
    """nanoGPT's token file (uint16 without a header), memory-mapped.

    Raises:
        DataError: missing, empty, a size that is no whole number of tokens, or contents that are plainly of another kind.
    """
    if not path.is_file():
        raise DataError(Issue(str(path), "no such token file", has_value=False, hint=hint or "wanted: train.bin and val.bin in one folder"))
    size = path.stat().st_size
    if size == 0 or size % 2:
        hint = "nanoGPT's format is uint16 without a header; make the file again"
        raise DataError(Issue(str(path), "is cut short, or not of uint16 tokens", f"{size} bytes", hint))
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    other = _other_kind(tokens[:65536])
    if other:
        raise DataError(Issue(str(path), f"is {other}, not of uint16 tokens", has_value=False, hint="tokens.astype('uint16').tofile(path)"))
    return tokens


def _other_kind(tokens: np.ndarray) -> str:
    """What the head of a file looks like when read in pairs of bytes, where that is surely something else; empty where it is not."""
    head = tokens.tobytes()
    if head.startswith(b"\x93NUMPY"):
        return "an array of numpy with its header"
    if len(tokens) >= 16 and not tokens[1::2].any() and tokens.any():
        return "of 8-byte integers" if not tokens[2::4].any() else "of 4-byte integers"
    if len(head) >= 64 and not head.translate(None, delete=_TEXT):
        return "plain text"
    return ""


def gpt2_encoder(folder: Path | None = None) -> tuple[Callable[[str], list[int]], int, int]:
    """(text -> tokens, end-of-text token, vocabulary size) of GPT-2, from the user's folder or from the prepared ``gpt2_bpe``.

    ``folder`` may be a file: then the vocabulary is looked for beside it.

    Raises:
        DataError: its vocabulary is in neither place, cannot be read, lacks the end of text, or does not fit uint16.
    """
    beside = folder.parent if folder is not None and folder.is_file() else folder
    for place in (beside, store.data_root() / "gpt2_bpe"):
        for vocabulary, merges in _VOCABULARIES:
            if place is not None and (place / vocabulary).is_file() and (place / merges).is_file():
                return _encoder(place / vocabulary, place / merges)
    hint = "xutrain data prepare gpt2_bpe (or --source with vocab.json and merges.txt), or put the two files beside the text"
    raise DataError(Issue("GPT-2 vocabulary", "is not there", has_value=False, hint=hint))


def _encoder(vocabulary: Path, merges: Path) -> tuple[Callable[[str], list[int]], int, int]:
    from tokenizers import ByteLevelBPETokenizer

    try:
        tokenizer: Any = ByteLevelBPETokenizer(str(vocabulary), str(merges))
    except Exception as reason:  # the library's own errors are plain exceptions
        raise DataError(
            Issue(str(vocabulary), f"is no vocabulary of byte pairs: {reason}", has_value=False, hint=f"see {merges}")
        ) from None
    end, size = tokenizer.token_to_id("<|endoftext|>"), int(tokenizer.get_vocab_size())
    if end is None:
        raise DataError(Issue(str(vocabulary), "has no token <|endoftext|>, which ends a document", has_value=False))
    if size > 1 << 16:
        raise DataError(Issue(str(vocabulary), "holds more tokens than a token file of uint16 can", size))
    return (lambda text: tokenizer.encode(text).ids), int(end), size


def _vocabulary(path: Path) -> Content:
    found = archive.collect(path, lambda name: name in sum(_VOCABULARIES, ()))
    for vocabulary, merges in _VOCABULARIES:
        if vocabulary in found and merges in found:
            size = len(json.loads(found[vocabulary]))
            if size != GPT2_TOKENS:
                raise DataError(Issue(str(path), f"GPT-2 has {GPT2_TOKENS} tokens", size))
            return {"vocab.json": found[vocabulary], "merges.txt": found[merges]}
    raise DataError(Issue(str(path), "holds neither vocab.json and merges.txt nor encoder.json and vocab.bpe", has_value=False))


def bytes_of(texts: list[str]) -> np.ndarray:
    """Documents as one array of bytes, uint8, an empty line between two of them."""
    return np.frombuffer("\n\n".join(texts).encode(), dtype=np.uint8)


def byte_pairs(train: np.ndarray, vocabulary: int) -> np.ndarray:
    """Merges learnt from the first two million bytes."""
    return bpe.train(train[: 1 << 21], vocabulary)
