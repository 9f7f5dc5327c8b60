"""From a mapping to a validated recipe: each chosen part brings the schema of its own options."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from xutrain import registry
from xutrain.errors import Issue, RecipeError
from xutrain.recipe.explain import issues_of
from xutrain.recipe.schema import Choice, Recipe


def validate(cls: type[Recipe], raw: dict[str, Any], verb: str) -> Recipe:
    """The recipe that ``raw`` describes, every default filled in. Raises RecipeError with all issues at once."""
    _import_plugins(raw.get("plugins"))
    problems: list[Issue] = []
    model = concrete(cls, raw, verb, "", problems)
    try:
        recipe = model.model_validate({**raw, "verb": verb})
    except ValidationError as error:
        raise RecipeError(*problems, *issues_of(error, model)) from None
    problems.extend([] if problems else recipe.issues())
    if problems:
        raise RecipeError(*problems)
    assert isinstance(recipe, Recipe)
    return recipe


def concrete(cls: type[BaseModel], raw: dict[str, Any], verb: str, prefix: str, problems: list[Issue]) -> Any:
    """``cls`` with every ``Choice`` section replaced by the chosen part's own options class; names in ``raw`` become canonical."""
    fields: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        where = f"{prefix}{name}"
        choice = next((m for m in field.metadata if isinstance(m, Choice)), None)
        if choice is None:
            section = _section(field.annotation)
            if section is not None and isinstance(raw.get(name), dict):
                inner = concrete(section, raw[name], verb, f"{where}.", problems)
                if inner is not section:
                    fields[name] = (inner, ... if field.is_required() else field.default)
            continue
        if name not in raw and choice.default is not None:
            raw[name] = choice.default
        if raw.get(name) is None:
            continue
        fields[name] = (_chosen(choice, raw, name, verb, where, problems), ...)
    return create_model(cls.__name__, __base__=cls, __module__=cls.__module__, **fields) if fields else cls


def _section(annotation: Any) -> type[BaseModel] | None:
    """The options class of a section, also of one that may be null; None for plain values."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [a for a in typing.get_args(annotation) if a is not type(None)] if union else [annotation]
    found = kinds[0] if len(kinds) == 1 else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _chosen(choice: Choice, raw: dict[str, Any], name: str, verb: str, where: str, problems: list[Issue]) -> Any:
    section = raw[name] if not isinstance(raw[name], str) else {"name": raw[name]}
    if not isinstance(section, dict) or "name" not in section:
        hint = f"for example `{name}: {{name: {registry.entries(choice.kind, verb)[0].name}}}`; all: xutrain ls {choice.kind}s"
        problems.append(Issue(f"{where}.name", f"says no {choice.kind}", section, hint))
        return Any
    try:
        part = registry.load(choice.kind, section["name"], verb=verb, where=f"{where}.name")
    except RecipeError as error:
        problems.extend(error.issues)
        return Any
    raw[name] = {**section, "name": part.entry.name}
    return concrete(part.Options, raw[name], verb, f"{where}.", problems)


def options(kind: str, name: str, values: dict[str, Any], verb: str | None = None) -> tuple[type, Any]:
    """The part called ``name`` and its validated options, for library use. Raises RecipeError."""
    part = registry.load(kind, name, verb=verb)
    raw = {**values, "name": part.entry.name}
    problems: list[Issue] = []
    model = concrete(part.Options, raw, verb or "", "", problems)
    try:
        chosen = model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(*problems, *issues_of(error, model, prefix=part.entry.name)) from None
    if problems:
        raise RecipeError(*problems)
    return part, chosen


def _import_plugins(plugins: Any) -> None:
    for module in plugins if isinstance(plugins, list) else []:
        if not all(part.isidentifier() for part in str(module).split(".")):
            raise RecipeError(Issue("plugins", "is not the name of a Python module", module, "dots between words, such as my_lab.codecs"))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                importlib.import_module(str(module))
        except ImportError as error:
            hint = "install the package that holds it, or put its folder on PYTHONPATH"
            raise RecipeError(Issue("plugins", f"cannot import: {error}", module, hint)) from None
        except SyntaxError as error:
            place = f"{error.filename}, line {error.lineno}"
            raise RecipeError(Issue("plugins", f"is not Python: {error.msg} ({place})", module)) from None
        except Exception as error:  # whatever the user's module does at its top level
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
            place = f"{frames[-1].filename}, line {frames[-1].lineno}"
            raise RecipeError(Issue("plugins", f"fails while it is imported: {type(error).__name__}: {error} ({place})", module)) from error
