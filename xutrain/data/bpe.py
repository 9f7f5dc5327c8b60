"""Byte-pair encoding on arrays: trained, applied and undone in numpy, the same on every machine. No torch here.

Tokens 0 .. 255 are bytes; token 256 + i is the i-th merged pair. Ties between equally frequent pairs go to the smaller pair.
"""

from __future__ import annotations

import numpy as np

BYTES = 256
LARGEST = 2048  # pair counts are one dense table of vocabulary^2


def train(data: np.ndarray, vocabulary: int) -> np.ndarray:
    """The merges that make a vocabulary of ``vocabulary`` tokens from bytes ``data`` (uint8), int64 of shape (n, 2).

    Fewer than asked for where no pair occurs twice any more.
    """
    assert BYTES <= vocabulary <= LARGEST
    ids, merges = data.astype(np.int64), []
    for token in range(BYTES, vocabulary):
        if len(ids) < 2:
            break
        counts = np.bincount(ids[:-1] * token + ids[1:], minlength=1)
        best = int(counts.argmax())
        if counts[best] < 2:
            break
        pair = divmod(best, token)
        merges.append(pair)
        ids = _merge(ids, pair, token)
    return np.array(merges, dtype=np.int64).reshape(-1, 2)


def encode(data: np.ndarray, merges: np.ndarray) -> np.ndarray:
    """Tokens of bytes ``data``, uint16: all merges in the order of training, each from left to right."""
    ids = data.astype(np.int64)
    for i, (left, right) in enumerate(merges):
        ids = _merge(ids, (int(left), int(right)), BYTES + i)
    return ids.astype(np.uint16)


def decode(tokens: np.ndarray, merges: np.ndarray) -> bytes:
    """The bytes that ``tokens`` stand for: the inverse of ``encode``."""
    words = [bytes([b]) for b in range(BYTES)]
    for left, right in merges:
        words.append(words[left] + words[right])
    return b"".join(words[t] for t in tokens)


def _merge(ids: np.ndarray, pair: tuple[int, int], token: int) -> np.ndarray:
    """``ids`` with every occurrence of ``pair`` replaced by ``token``; in a run of one value every second place counts."""
    places = np.flatnonzero((ids[:-1] == pair[0]) & (ids[1:] == pair[1]))
    if not len(places):
        return ids
    if pair[0] == pair[1]:
        begins = np.flatnonzero(np.diff(places, prepend=-2) > 1)
        run = np.arange(len(places)) - np.repeat(begins, np.diff(np.append(begins, len(places))))
        places = places[run % 2 == 0]
    merged = ids.copy()
    merged[places] = token
    keep = np.ones(len(ids), dtype=bool)
    keep[places + 1] = False
    return merged[keep]
