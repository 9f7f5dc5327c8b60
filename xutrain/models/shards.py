"""Safetensors files read and written tensor by tensor, by name, through the index; never a whole shard in memory.

A ``Source`` is only ever opened for reading. A ``Target`` has the layout fixed before the first tensor is written, so any
process may write any tensor at its place, in any order, and a second write of the same tensor gives the same file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xutrain.errors import DataError, Failed, Issue

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 1 << 26


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def _view(buffer: Tensor) -> memoryview:
    """The bytes of a uint8 tensor."""
    held: Any = buffer.numpy()
    return memoryview(held)


def _bad(where: Path, what: str, hint: str = "") -> DataError:
    return DataError(Issue(str(where), what, hint=hint, has_value=False))


class Source:
    """A checkpoint folder, read by on-disk tensor names.

    Raises DataError on opening when a shard is missing, truncated or malformed, or when the index names a tensor that its
    shard does not hold; so a damaged checkpoint is found before any work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.headers: dict[str, bytes] = {}
        self._open: dict[str, int] = {}
        if not folder.is_dir():
            raise _bad(folder, "no such checkpoint folder", "pass a folder that holds config.json and *.safetensors")
        index = self._index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._header(file)
        for name, file in index.items():
            if name not in self.entries or self.entries[name].file != file:
                raise _bad(folder / INDEX, f"names tensor {name}, which {file} does not hold", "download the checkpoint again")

    def _index(self) -> dict[str, str]:
        file = self.folder / INDEX
        if not file.exists():
            if not (self.folder / SINGLE).exists():
                others = [p.name for p in self.folder.glob("*.bin")]
                hint = "convert the *.bin files to safetensors first (save_pretrained does)" if others else f"expected {INDEX} or {SINGLE}"
                raise _bad(self.folder, "holds no safetensors weights", hint)
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            names = {str(k): str(v) for k, v in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
            raise _bad(file, f"is not a safetensors index: {reason!r}") from None
        for name in names.values():
            if name in ("", ".", "..") or name != Path(name).name:  # the output has the same file names: they must not lead elsewhere
                raise _bad(file, f"names a shard outside the checkpoint folder: {name}", "shards must lie beside the index")
        if not names:
            raise _bad(file, "names no tensor", "download the checkpoint again")
        return names

    def _header(self, file: str) -> None:
        path = self.folder / file
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                raw = stream.read(length) if length <= size else b""
        except FileNotFoundError:
            raise _bad(path, "shard is missing", "download the checkpoint again") from None
        except struct.error:
            raise _bad(path, "shard is truncated: no header", "download the checkpoint again") from None
        if len(raw) < length:
            raise _bad(path, "shard is truncated inside its header", "download the checkpoint again")
        try:
            header = json.loads(raw)
            for name, spec in header.items():
                if name != "__metadata__":
                    start, stop = (8 + length + int(n) for n in spec["data_offsets"])
                    shape = tuple(int(n) for n in spec["shape"])
                    dtype = DTYPES.get(spec["dtype"])
                    if not 8 + length <= start <= stop or (dtype and math.prod(shape) * dtype.itemsize != stop - start):
                        raise ValueError(f"tensor {name} of shape {shape} has data_offsets {spec['data_offsets']}")
                    self.entries[name] = Entry(name, file, spec["dtype"], shape, start, stop)
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise _bad(path, f"is not a safetensors file: {reason!r}") from None
        needed = max((e.stop for e in self.entries.values() if e.file == file), default=8 + length)
        if size < needed:
            raise _bad(path, f"shard is truncated: {size} bytes of {needed}", "download the checkpoint again")
        self.headers[file] = struct.pack("<Q", length) + raw

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def need(self, names: Iterable[str]) -> None:
        """Raises DataError when a tensor that the architecture has is not in the checkpoint."""
        missing = [n for n in names if n not in self.entries]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise _bad(self.folder, f"tensor {missing[0]}{more} is missing", "does config.json belong to these weights?")

    def entry(self, name: str) -> Entry:
        self.need([name])
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, in memory of its own."""
        e = self.entry(name)
        if e.dtype not in DTYPES:
            raise _bad(self.folder / e.file, f"tensor {name} has dtype {e.dtype}", f"supported: {', '.join(DTYPES)}")
        dtype = DTYPES[e.dtype]
        buffer = torch.empty(e.bytes, dtype=torch.uint8)
        self.read_into(e, buffer)
        return buffer.view(dtype).view(e.shape) if e.bytes else torch.empty(e.shape, dtype=dtype)

    def read_into(self, e: Entry, buffer: Tensor) -> None:
        view, at = _view(buffer), 0
        while at < e.bytes:
            done = os.preadv(self._descriptor(e.file), [view[at : at + _PIECE]], e.start + at)
            if done == 0:
                raise _bad(self.folder / e.file, "shard ended while it was read: it shrank or was replaced")
            at += done

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._open[file]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The header of a shard that holds ``tensors`` (name -> dtype code, shape) one after the other."""
    at = 0
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (code, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[code].itemsize
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Target:
    """Shards to be filled. ``headers``: the bytes of each file's header, which fix every tensor's place."""

    def __init__(self, folder: Path, headers: Mapping[str, bytes]) -> None:
        self.folder = folder
        self.headers = dict(headers)
        self.entries: dict[str, Entry] = {}
        self.sizes: dict[str, int] = {}
        self._open: dict[str, int] = {}
        for file, raw in self.headers.items():
            self.sizes[file] = len(raw)
            for name, spec in json.loads(raw[8:]).items():
                if name != "__metadata__":
                    start, stop = (len(raw) + int(n) for n in spec["data_offsets"])
                    self.entries[name] = Entry(name, file, spec["dtype"], tuple(spec["shape"]), start, stop)
                    self.sizes[file] = max(self.sizes[file], stop)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def create(self) -> None:
        """Reserve the whole space, so that a full disk is found now and not after hours. Raises Failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, raw in self.headers.items():
            with self._full(file):
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._descriptor(file), 0, self.sizes[file])
                os.ftruncate(self._descriptor(file), self.sizes[file])
                os.pwrite(self._descriptor(file), raw, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor at its place, in the stored dtype."""
        e = self.entries[name]
        assert tuple(tensor.shape) == e.shape, f"{name}: {tuple(tensor.shape)} for {e.shape}"
        stored = tensor.detach().to("cpu", DTYPES[e.dtype]).contiguous()
        self._put(e, _view(stored.view(-1).view(torch.uint8)) if e.bytes else memoryview(b""))

    def copy(self, source: Source, name: str, to: str | None = None) -> None:
        """Copy one tensor bit by bit, in pieces."""
        e, place = source.entry(name), self.entries[to or name]
        assert e.bytes == place.bytes and e.dtype == place.dtype
        for at in range(0, e.bytes, _PIECE):
            part = Entry(e.name, e.file, e.dtype, e.shape, e.start + at, min(e.start + at + _PIECE, e.stop))
            buffer = torch.empty(part.bytes, dtype=torch.uint8)
            source.read_into(part, buffer)
            self._put(Entry(place.name, place.file, "U8", (), place.start + at, place.start + at + part.bytes), _view(buffer))

    def _put(self, e: Entry, data: memoryview) -> None:
        at = 0
        while at < e.bytes:
            with self._full(e.file):
                at += os.pwrite(self._descriptor(e.file), data[at : at + _PIECE], e.start + at)

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns."""
        for file, descriptor in self._open.items():
            with self._full(file):
                os.fsync(descriptor)

    def write_index(self) -> None:
        """The index, last: until it exists no library takes the folder for a checkpoint. A single shard needs none."""
        if set(self.headers) == {SINGLE}:
            return
        total = sum(e.bytes for e in self.entries.values())
        table = {"metadata": {"total_size": total}, "weight_map": {n: e.file for n, e in sorted(self.entries.items())}}
        write_aside(self.folder / INDEX, (json.dumps(table, indent=2) + "\n").encode())

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
        return self._open[file]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _full(self, file: str) -> _DiskFault:
        return _DiskFault(self.folder / file, self.bytes)


class _DiskFault:
    """Turns a full disk into an error that says how much room is needed."""

    def __init__(self, file: Path, needed: int) -> None:
        self.file, self.needed = file, needed

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        if isinstance(value, OSError) and value.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some room or choose another output folder; running the same command again continues"
            what = f"the disk is full; the pruned checkpoint needs {self.needed / 1e9:.3f} GB"
            raise Failed(Issue(str(self.file), what, hint=hint, has_value=False)) from value


def write_aside(file: Path, data: bytes) -> None:
    """Replace a file in one step: written aside, synced, renamed."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _DiskFault(file, len(data)), aside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A whole small model as one shard with its config.json, for models that fit in memory."""
    header = header_of({name: (CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
    target = Target(folder, {SINGLE: header})
    target.create()
    for name, tensor in tensors.items():
        target.write(name, tensor)
    target.sync()
    target.close()
    write_aside(folder / "config.json", (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode())
