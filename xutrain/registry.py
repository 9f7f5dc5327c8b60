"""Named parts: codecs, methods, data sets, models. One file each, found by name without importing the others.

A part announces itself with a decorator whose arguments are literals, so that ``xutrain ls`` can list all parts by
parsing their files, without importing torch. ``load`` imports the one file that it needs.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from xutrain.errors import Issue, RecipeError

PACKAGE = Path(__file__).parent
#: Where the parts of a kind live, relative to the package.
ROOMS = {
    "codec": ("methods/codecs",),
    "method": ("methods",),
    "dataset": ("data",),
    "model": ("models",),
    "partition": ("data",),
    "agent": ("methods/federate/search",),
}
T = TypeVar("T", bound=type)


class Options(BaseModel):
    """Options of a part or of a recipe section: unknown keys are errors, values are strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Named(Options):
    """Options of a part that is chosen by ``name``."""

    name: str


@dataclass(frozen=True)
class Entry:
    """What is known of a part without importing it."""

    kind: str
    name: str
    module: str
    verbs: tuple[str, ...] = ()
    paper: str = ""
    summary: str = ""
    aliases: tuple[str, ...] = ()
    cls: type | None = None


_PLUGINS: dict[tuple[str, str, str], Entry] = {}


def codec(name: str, *, paper: str = "", summary: str, aliases: tuple[str, ...] = (), verbs: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a codec class. Its ``Options`` (a ``Named`` subclass) declares what a recipe may set."""
    return _announce(Entry("codec", name, "", verbs, paper, summary, aliases))


def method(verb: str | tuple[str, ...], name: str, *, paper: str = "", summary: str, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a method of one verb or of several."""
    verbs = (verb,) if isinstance(verb, str) else verb
    return _announce(Entry("method", name, "", verbs, paper, summary, aliases))


def dataset(name: str, *, summary: str, aliases: tuple[str, ...] = (), verbs: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a data set. ``verbs`` empty means: any verb that takes this kind of task."""
    return _announce(Entry("dataset", name, "", verbs, "", summary, aliases))


def model(name: str, *, paper: str = "", summary: str, aliases: tuple[str, ...] = (), verbs: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a model: a class with ``Options`` and a static ``build(options, task) -> nn.Module``."""
    return _announce(Entry("model", name, "", verbs, paper, summary, aliases))


def partition(name: str, *, summary: str, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a rule that deals a data set to clients: a class with ``Options`` and a static ``deal``."""
    return _announce(Entry("partition", name, "", (), "", summary, aliases))


def agent(name: str, *, paper: str = "", summary: str, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register an agent that draws hyper-parameters of a federated round: see ``methods/federate/search/base.py``."""
    return _announce(Entry("agent", name, "", ("federate",), paper, summary, aliases))


def _announce(entry: Entry) -> Callable[[T], T]:
    def mark(cls: T) -> T:
        known = replace(entry, module=cls.__module__, cls=cls)
        cls.entry = known  # type: ignore[attr-defined]
        if not cls.__module__.startswith("xutrain."):
            for verb in known.verbs or ("",):
                _PLUGINS[known.kind, verb, known.name] = known
        return cls

    return mark


def entries(kind: str, verb: str | None = None) -> list[Entry]:
    """All parts of a kind, sorted by name; with ``verb``, those that the verb may use."""
    found = [*_scanned(kind), *(e for (k, _, _), e in _PLUGINS.items() if k == kind)]
    if verb is not None:
        found = [e for e in found if not e.verbs or verb in e.verbs]
    return sorted({(e.name, e.verbs): e for e in found}.values(), key=lambda e: (e.name, e.verbs))


@functools.cache
def _scanned(kind: str) -> tuple[Entry, ...]:
    files = sorted(f for room in ROOMS[kind] for f in (PACKAGE / room).rglob("*.py"))
    return tuple(e for f in files for e in _announced_in(f, kind))


def _announced_in(file: Path, kind: str) -> Iterator[Entry]:
    source = file.read_text(encoding="utf-8")
    if f"@{kind}(" not in source:
        return
    module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for node in ast.parse(source).body:
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == kind:
                args = [ast.literal_eval(a) for a in call.args]
                words = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
                if kind == "method":
                    verbs = args.pop(0)
                    words["verbs"] = (verbs,) if isinstance(verbs, str) else tuple(verbs)
                elif kind == "agent":
                    words["verbs"] = ("federate",)
                yield Entry(kind, args[0], module, **words)


def canonical(name: str) -> str:
    """Spelling that names are compared by: lower case, underscores."""
    return name.strip().lower().replace("-", "_")


def find(kind: str, name: object, *, verb: str | None = None, where: str = "") -> Entry:
    """The entry called ``name``.

    Raises:
        RecipeError: the name is unknown; names the nearest ones and how to list them.
    """
    known = entries(kind, verb)
    wanted = canonical(name) if isinstance(name, str) else ""
    for entry in [*(e for e in known if wanted == e.name), *(e for e in known if wanted in e.aliases)]:
        return entry
    names = sorted({e.name for e in known})
    near = suggest(wanted, names)
    listing = f"xutrain ls {kind}s"
    some = f"one of {', '.join(names)} ({listing})" if len(names) <= 40 else f"{listing} has them"
    hint = f"did you mean {near}? all of them: {listing}" if near else some
    other = [v for e in entries(kind) if e.name == wanted for v in e.verbs]
    if other and verb:
        hint = f"{wanted} belongs to `xutrain {other[0]}`; {hint}"
    raise RecipeError(Issue(where or kind, f"unknown {kind}" + (f" for {verb}" if verb else ""), name, hint))


def load(kind: str, name: object, *, verb: str | None = None, where: str = "") -> Any:
    """Import the part called ``name`` and return its class. Raises RecipeError for an unknown or broken part."""
    entry = find(kind, name, verb=verb, where=where)
    if entry.cls is not None:
        return entry.cls
    try:
        module = importlib.import_module(entry.module)
    except ImportError as reason:
        raise RecipeError(Issue(where or kind, f"{kind} exists but its module failed to import: {reason}", name)) from reason
    for value in vars(module).values():
        known = getattr(value, "entry", None)
        if isinstance(known, Entry) and known.kind == kind and known.name == entry.name and value.__module__ == entry.module:
            return value
    raise AssertionError(f"{entry.module} announces {entry.name} but does not define it")


def suggest(word: str, among: list[str], n: int = 3) -> str:
    """The nearest names as text, or an empty string."""
    close = difflib.get_close_matches(word, among, n=n, cutoff=0.6) or [a for a in among if word and (word in a or a in word)][:n]
    return ", ".join(close)
