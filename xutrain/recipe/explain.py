"""Validation errors in a user's words: which key, what is wrong, the value, what to write instead."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from xutrain.errors import Issue
from xutrain.registry import suggest

_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a word or a text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "missing": "is missing",
    "finite_number": "must be finite",
}


def issues_of(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> list[Issue]:
    """One issue per thing wrong, in the order of the recipe."""
    found: dict[tuple[str, str], Issue] = {}
    for item in error.errors(include_url=False):
        path = _path(item["loc"], cls)
        where = ".".join(str(p) for p in ([prefix] if prefix else []) + path)
        issue = _issue(item, where, path, cls)
        found.setdefault((where, issue.what), issue)
    return list(found.values())


def _issue(item: Any, where: str, path: list[str | int], cls: type[BaseModel]) -> Issue:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        names = sorted(owner.model_fields) if owner else []
        near = suggest(str(path[-1]), names)
        hint = f"did you mean {near}?" if near else (f"known keys here: {', '.join(names)}" if names else "")
        return Issue(where, "unknown key", value, hint)
    if kind == "missing":
        return Issue(where, "is missing", hint=_describe(cls, path), has_value=False)
    if kind == "literal_error":
        allowed = str(context.get("expected", "")).replace("'", "")
        near = suggest(str(value), allowed.replace(" or ", ", ").split(", "))
        return Issue(where, f"must be one of {allowed}", value, f"did you mean {near}?" if near else "")
    if kind in ("value_error", "assertion_error"):
        return Issue(where, str(context.get("error", item["msg"])).removeprefix("Value error, "), value, _describe(cls, path))
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}[bounds[kind]]
        return Issue(where, f"must be {words} {context[bounds[kind]]}", value, _describe(cls, path))
    what = _WORDS.get(kind, item["msg"].replace("Input should", "should"))
    hint = _describe(cls, path)
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        hint = f"write it without quotes, as a {'truth value' if kind == 'bool_type' else 'number'}" + (f"; {hint}" if hint else "")
    return Issue(where, what, value, hint)


def _path(loc: tuple[str | int, ...], cls: type[BaseModel]) -> list[str | int]:
    """The location without the names that pydantic adds for members of a union."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = cls
    for part in loc:
        if owner is not None or isinstance(part, int) or not path:
            path.append(part)
            owner = _field_model(owner, part) if owner is not None else None
    return path


def _owner(cls: type[BaseModel], path: list[str | int]) -> type[BaseModel] | None:
    owner: type[BaseModel] | None = cls
    for part in path:
        owner = _field_model(owner, part) if owner is not None else None
    return owner


def _field_model(owner: type[BaseModel], part: str | int) -> type[BaseModel] | None:
    field = owner.model_fields.get(str(part))
    return _model_in(field.annotation) if field else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)
    return None


def _describe(cls: type[BaseModel], path: list[str | int]) -> str:
    """The field's own sentence."""
    owner = _owner(cls, path[:-1]) if path else None
    field = owner.model_fields.get(str(path[-1])) if owner and path else None
    return field.description or "" if field else ""
