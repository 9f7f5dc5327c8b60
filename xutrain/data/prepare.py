"""``xutrain data prepare``: take the first source that works, decode it, check its content, put it in place. No torch here.

What can be prepared is in ``manifest.yaml``; each entry names a module of this folder whose ``read(name, path)`` decodes whatever
the user or a source delivers. So another kind of data is an entry and a module, and nothing here changes.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from xutrain.data import store
from xutrain.data.fetch import Unavailable, fetch
from xutrain.data.store import Content, Entry, Files, Folder, data_root, verify
from xutrain.errors import DataError, Issue, XutrainError
from xutrain.registry import entries

__all__ = ["listing", "prepare", "verify"]


def _silent(text: str) -> None:
    pass


def prepare(
    name: str, source: Path | str | None = None, root: Path | str | None = None, say: Callable[[str], None] = _silent
) -> dict[str, Any]:
    """Make a set ready; do nothing when it is. Several processes may ask at once: one works, the others wait.

    Args:
        source: the user's folder, archive or file; None tries the official files, then the packages that ship the set.
        root: the data folder; None is $XUTRAIN_DATA, else ~/.cache/xutrain/data.
        say: receives one line of progress at a time.

    Returns:
        {"name", "path", "status": "ready" or "was ready", "source", "pinned", "bytes", "notes"}.

    Raises:
        DataError: unknown name, unusable source, content that is not what the manifest pins, or no source that works;
            the hint says how to get the set by hand.
    """
    name, known = store.entry(name)
    place = data_root(root)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / f".{name}.lock"):
        status = "was ready" if _is_ready(name, known, place) else "ready"
        if status == "ready":
            _remove_leftovers(name, place)
            content, came_from = _from_user(name, known, Path(source).expanduser()) if source else _from_sources(name, known, place, say)
            if not isinstance(content, (Files, Folder)):
                content = store.restore_order(content, known.arrays)
            say(f"checking and writing {place / name}")
            store.write(name, content, place, came_from, known.arrays)
            shutil.rmtree(_downloads(name, place), ignore_errors=True)
    return {"name": name, "status": status, **_facts(name, known, place)}


def listing(root: Path | str | None = None) -> list[dict[str, Any]]:
    """Every data set: {"name", "kind", "summary", "status", "path", "bytes", "licence", "obtain"}.

    Status: ready, not prepared, damaged (its record cannot be read), or built in (nothing to prepare: it is embedded or
    generated, or reads the user's own files).
    """
    place, known = data_root(root), store.manifest()
    rows = []
    for name, item in known.items():
        row = {"name": name, "kind": item.kind, "summary": item.summary, "status": "not prepared", "path": None, "bytes": 0}
        if (place / name).is_dir():
            try:
                row |= {
                    "status": "ready" if _is_ready(name, item, place) else "damaged",
                    "path": str(place / name),
                    "bytes": _size(place / name),
                }
            except XutrainError:
                row |= {"status": "damaged", "path": str(place / name)}
        rows.append({**row, "licence": item.licence, "obtain": f"xutrain data prepare {name}" if item.sources else item.obtain})
    for part in entries("dataset"):
        if part.name not in known:
            built_in = {"kind": "built in", "status": "built in", "path": None, "bytes": 0, "licence": "", "obtain": ""}
            rows.append({"name": part.name, "summary": part.summary, **built_in})
    return sorted(rows, key=lambda row: str(row["name"]))


def _from_user(name: str, known: Entry, source: Path) -> tuple[Content | Files | Folder, str]:
    if not source.exists():
        raise DataError(Issue("--source", "no such file or folder", str(source), f"accepted: {known.accepts}"))
    return _reader(known)(name, source), str(source)


def _from_sources(name: str, known: Entry, place: Path, say: Callable[[str], None]) -> tuple[Content | Files | Folder, str]:
    failures = []
    for i, source in enumerate(known.sources):
        say(f"trying {source.label}")
        folder = _downloads(name, place) / str(i)
        try:
            files = fetch(source, folder, say, alternatives=i + 1 < len(known.sources))
            return _reader(known)(name, files), source.label
        except Unavailable as reason:
            failures.append(f"{source.label}: {reason}")
            say(failures[-1])
        except DataError as reason:
            failures.append(f"{source.label}: {reason.issues[0].what}")
            say(failures[-1])
            shutil.rmtree(folder, ignore_errors=True)
    what = "; ".join(["no source works here", *failures]) if failures else "must be obtained by hand"
    by_hand = known.obtain or f"get it from {known.homepage}"
    hint = f"{by_hand}; then: xutrain data prepare {name} --source PATH ({known.accepts})"
    raise DataError(Issue(f"data set {name}", what, has_value=False, hint=hint))


def _reader(known: Entry) -> Callable[[str, Path], Content | Files | Folder]:
    reader: Callable[[str, Path], Content | Files | Folder] = importlib.import_module(known.module).read
    return reader


def _is_ready(name: str, known: Entry, place: Path) -> bool:
    """Whether the record is there, its files open, and it is the content that the manifest pins (checksums as recorded)."""
    try:
        record = store.recorded(name, place)
        store.open_arrays(name, place)
    except DataError:
        return False
    if "folder" in record:
        return Path(record["folder"]).is_dir()
    found = record.get("arrays", {})
    files = all((place / name / key).is_file() for key in record.get("files", {}))
    return files and all(k in found and pin.sha256 in ("", found[k]["sha256"]) for k, pin in known.arrays.items())


def _facts(name: str, known: Entry, place: Path) -> dict[str, Any]:
    pinned = bool(known.arrays) and all(pin.sha256 for pin in known.arrays.values())
    record = store.recorded(name, place)
    notes = record.get("facts", {}).get("notes", [])
    return {"path": str(place / name), "source": record["source"], "pinned": pinned, "bytes": _size(place / name), "notes": notes}


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _downloads(name: str, place: Path) -> Path:
    return place / ".downloads" / name


def _remove_leftovers(name: str, place: Path) -> None:
    """What an interrupted call left; partial downloads stay, to be continued."""
    for leftover in [*place.glob(f".{name}.*.partial"), *place.glob(f".{name}.*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
