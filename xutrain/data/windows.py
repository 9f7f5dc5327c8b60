"""Token windows of real text, for calibration and perplexity: embedded text as bytes, or a user's file and tokenizer.

The embedded text is the reference manual that every Python carries (``pydoc_data.topics``, about 465 kB): chunks of 4000
bytes, shuffled once, 8 % for validation, 8 % for calibration, the rest for training. It is real English and code, it needs
no download, and its few bytes differ between Python versions.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import DataError, Issue

CHUNK = 4000
SHARE = 0.08
#: Bytes are tokens: no tokenizer, no vocabulary file.
BYTES = 256


@functools.cache
def embedded() -> dict[str, Tensor]:
    """Splits ``train``, ``val`` and ``calibration`` of the embedded text, each int64 (bytes,)."""
    import pydoc_data.topics

    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    pieces = list(data.split(CHUNK))[:-1]
    order = torch.randperm(len(pieces), generator=Key(0, "windows/split").generator()).tolist()
    share = int(len(pieces) * SHARE)
    at = {"val": order[:share], "calibration": order[share : 2 * share], "train": order[2 * share :]}
    return {name: torch.cat([pieces[i] for i in chosen]) for name, chosen in at.items()}


def cut(tokens: Tensor, length: int, most: int | None = None, where: str = "text") -> Tensor:
    """Non-overlapping windows (n, length) from the beginning, the convention of published perplexities.

    Raises DataError when the text does not fill one window.
    """
    n = len(tokens) // length
    if n == 0:
        raise DataError(
            Issue(where, f"holds {len(tokens)} tokens, less than one window of {length}", has_value=False, hint="use a shorter length")
        )
    return tokens[: min(n, most or n) * length].view(-1, length)


def draw(tokens: Tensor, samples: int, length: int, key: Key, where: str = "calibration") -> Tensor:
    """``samples`` windows (samples, length) at random places; without overlap where the text is long enough.

    Raises DataError when the text is shorter than a window, or so short that windows would mostly repeat each other.
    """
    slots = len(tokens) // length
    if samples > 4 * slots:
        hint = f"at most {4 * slots} windows of {length} tokens make sense; lower calibration.samples or calibration.length"
        raise DataError(
            Issue(where, f"the text has {len(tokens)} tokens, too few for {samples} windows of {length}", has_value=False, hint=hint)
        )
    generator = key.generator()
    if samples <= slots:
        slack = len(tokens) - slots * length
        shift = int(torch.randint(slack + 1, (), generator=generator))
        starts = torch.randperm(slots, generator=generator)[:samples] * length + shift
    else:
        starts = torch.randint(len(tokens) - length + 1, (samples,), generator=generator)
    return torch.stack([tokens[s : s + length] for s in starts.tolist()])


def documents(path: Path) -> Iterator[str]:
    """Texts of a file: the ``text`` field of each line of .json/.jsonl (also .gz, as C4 ships), else the whole file as one."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            if {".json", ".jsonl"} & set(path.suffixes):
                for number, line in enumerate(stream, 1):
                    try:
                        yield str(json.loads(line)["text"])
                    except (ValueError, KeyError, TypeError):
                        what = f"line {number} is no JSON object with a text field"
                        raise DataError(Issue(str(path), what, has_value=False)) from None
            else:
                yield stream.read()
    except FileNotFoundError:
        raise DataError(Issue(str(path), "no such text file", has_value=False, hint="give a .txt, .jsonl or C4 .json.gz file")) from None
    except (OSError, UnicodeDecodeError, EOFError) as reason:
        raise DataError(Issue(str(path), f"cannot be read: {reason}", has_value=False)) from None


def tokenizer(folder: Path | None) -> Any:
    """The tokenizer of a checkpoint folder as ``text -> list of ids``; bytes for the embedded model (None).

    Raises DataError when the folder has no tokenizer that transformers can load without running foreign code.
    """
    if folder is None:
        return lambda text: list(text.encode())
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as reason:
        hint = "copy tokenizer.json (and tokenizer_config.json) into the checkpoint folder, or give tokenizer="
        raise DataError(Issue(str(folder), f"has no usable tokenizer: {str(reason).splitlines()[0]}", has_value=False, hint=hint)) from None
    return lambda text: loaded(text, verbose=False)["input_ids"]


def file_windows(path: Path, encode: Any, length: int, most: int | None = None) -> Tensor:
    """Perplexity windows of a text file: the whole text tokenized at once, cut without overlap (Wanda's convention)."""
    return cut(torch.tensor(encode("\n\n".join(documents(path))), dtype=torch.int64), length, most, str(path))


def file_samples(path: Path, encode: Any, samples: int, length: int, key: Key) -> Tensor:
    """Calibration windows of a file. JSON lines: random documents longer than a window, a random window of each (the C4
    convention); plain text: ``draw``. Raises DataError when too few documents are long enough."""
    texts = list(documents(path))
    if len(texts) == 1:
        return draw(torch.tensor(encode(texts[0]), dtype=torch.int64), samples, length, key, str(path))
    generator, found = key.generator(), []
    for i in torch.randperm(len(texts), generator=generator).tolist():
        if len(texts[i]) <= length // 4:  # cannot have more tokens than a window; saves most of the tokenizing
            continue
        ids = encode(texts[i])
        if len(ids) > length:
            start = int(torch.randint(len(ids) - length, (), generator=generator))
            found.append(torch.tensor(ids[start : start + length], dtype=torch.int64))
        if len(found) == samples:
            return torch.stack(found)
    hint = "use a shorter calibration.length or fewer calibration.samples"
    raise DataError(
        Issue(
            str(path),
            f"only {len(found)} of {len(texts)} documents are longer than {length} tokens; {samples} needed",
            has_value=False,
            hint=hint,
        )
    )
