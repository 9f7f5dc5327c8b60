"""Strict YAML: no duplicate keys, no aliases, no tags, numbers as people write them, booleans only as true and false."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import yaml

from xutrain.errors import Issue, RecipeError

MAX_BYTES = 1 << 20
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:e[-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolvers of YAML 1.2 (``off`` stays a word, ``1e-3`` is a number)."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed; use `extends:` to share", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: dict[str, int] = {}
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a word; put it in quotes", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} is given twice, on lines {seen[key]} and {line}", problem_mark=key_node.start_mark
            )
        seen[key] = line
        result[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return result


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node)).replace("_", "")
    if _INT.match(text):
        if len(text) > 40:
            raise yaml.MarkedYAMLError(problem="number is too large", problem_mark=node.start_mark)
        return int(text)
    lowered = text.lower()
    value = float(text if "inf" not in lowered and "nan" not in lowered else lowered.replace(".", ""))
    if not math.isfinite(value):
        raise yaml.MarkedYAMLError(problem=f"number {text} is not finite", problem_mark=node.start_mark)
    return int(value) if "." not in text and value.is_integer() and abs(value) < 2**53 else value  # 1e3 is the integer 1000


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))  # type: ignore[no-untyped-call]
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])  # type: ignore[no-untyped-call]
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))  # type: ignore[no-untyped-call]


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises RecipeError that names ``where``, the line and what to do."""
    if len(text) > MAX_BYTES:
        raise RecipeError(Issue(where, f"is larger than {MAX_BYTES >> 20} MiB", len(text), "a recipe is a page of text"))
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise RecipeError(
            Issue(place, str(error.problem or error.context or error), hint=_hint(str(error.problem)), has_value=False)
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(Issue(where, f"is not YAML: {str(error).splitlines()[0]}", has_value=False)) from None
    except RecursionError:
        raise RecipeError(Issue(where, "is nested too deeply", has_value=False)) from None


def _hint(problem: str) -> str:
    if "could not determine a constructor" in problem:
        return "tags such as !!python/... are never executed; write plain values"
    if "given twice" in problem:
        return "keep one of the two"
    if "mapping values are not allowed" in problem or "could not find expected" in problem:
        return "write `key: value`, with a space after the colon and equal indents"
    return "indent with spaces and close every quote and bracket" if "found character" in problem or "expected" in problem else ""


#: what texts were parsed to: recipes extend the same few files over and over
_KNOWN: dict[str, Any] = {}


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The mapping in a YAML file and the file's text. Raises RecipeError for anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(Issue(str(path), f"is not UTF-8 text (byte {error.start})", has_value=False, hint="save it as UTF-8")) from None
    except IsADirectoryError:
        raise RecipeError(Issue(str(path), "is a folder, not a recipe", has_value=False)) from None
    except OSError as error:
        raise RecipeError(Issue(str(path), f"cannot be read: {error.strerror}", has_value=False)) from None
    if text not in _KNOWN:
        if len(_KNOWN) > 1000:
            _KNOWN.clear()
        _KNOWN[text] = parse(text, str(path))
    value = copy.deepcopy(_KNOWN[text])
    if value is None:
        raise RecipeError(Issue(str(path), "is empty", has_value=False, hint="start from `xutrain cp RECIPE my.yaml`"))
    if not isinstance(value, dict):
        raise RecipeError(Issue(str(path), "is not a mapping of keys to values", value, "a recipe begins with lines such as `seed: 0`"))
    return value, text


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, flow style for short lists, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _Dumper, data: list[Any]) -> yaml.Node:
    flow = all(not isinstance(v, (dict, list)) for v in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))  # a text like 1e3 needs quotes here


def dump(value: Any) -> str:
    """YAML text that ``parse`` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
