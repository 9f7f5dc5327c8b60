"""What a recipe reads from disk, looked for before a job is submitted: a missing set shall not cost a night in the queue. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xutrain.data import store
from xutrain.data.medical_lists import find_list
from xutrain.data.prepare import listing
from xutrain.errors import DataError, Issue
from xutrain.recipe.schema import Recipe

#: keys of a recipe that name a file or a folder which has to be there; ``embedded`` and null need nothing
_PATHS = (
    ("data", "path"),
    ("data", "test_path"),
    ("model", "path"),
    ("calibration", "source"),
    ("calibration", "tokenizer"),
    ("distill", "source"),
    ("from_sums",),
)
_TABLES = (("data", "files"), ("evaluation", "texts"))


def missing(recipe: Recipe) -> list[Issue]:
    """Prepared sets, lists and paths of a recipe that are not on this machine; each hint is the command that makes them."""
    raw = recipe.model_dump(mode="json")
    data = raw.get("data") or {}
    found = [_set(name) for name in _sets(data)]
    for keys in _PATHS:
        found.append(_path(".".join(keys), _at(raw, keys)))
    for keys in _TABLES:
        for name, value in (_at(raw, keys) or {}).items():
            found.append(_path(f"{'.'.join(keys)}.{name}", value))
    for value in (data.get("lists") or {}).values():
        try:
            find_list(str(value), str(data.get("root") or ""))
        except DataError as error:
            found += error.issues
    return [issue for issue in found if issue is not None]


def _sets(data: dict[str, Any]) -> Iterator[str]:
    """The prepared sets that a data section reads."""
    known = store.manifest()
    if data.get("name") in known and not data.get("path"):
        yield str(data["name"])
    if data.get("prepared"):
        yield str(data["prepared"])
    if data.get("tokenizer") == "gpt2" and not data.get("path"):
        yield "gpt2_bpe"


def _set(name: str) -> Issue | None:
    row = next(r for r in listing() if r["name"] == name)
    if row["status"] == "ready":
        return None
    known = store.manifest()[name]
    command = f"xutrain data prepare {name}" + ("" if known.sources else f" --source PATH   ({known.accepts})")
    what = "is damaged" if row["status"] == "damaged" else "is not prepared"
    if row["status"] == "damaged":
        command = f"rm -r {row['path']} && {command}"
    return Issue(f"data set {name}", f"{what} (looked in {store.data_root() / name})", has_value=False, hint=command)


def _path(where: str, value: Any) -> Issue | None:
    if not isinstance(value, str) or value == "embedded" or Path(value).expanduser().exists():
        return None
    return Issue(where, "no such file or folder", value, "put it there, or give another path")


def _at(raw: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = raw
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
