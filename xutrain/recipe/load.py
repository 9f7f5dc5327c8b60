"""A recipe by name or path, with overrides, as a validated frozen value."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xutrain.errors import Issue, RecipeError
from xutrain.families import FAMILIES, Family
from xutrain.recipe import catalog, yamlfile
from xutrain.recipe.resolve import validate
from xutrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Loaded:
    """A validated recipe and where it came from."""

    recipe: Recipe
    verb: str
    name: str
    path: Path | None
    source: str
    overrides: tuple[str, ...]


def load(config: str, verb: str | None = None, overrides: Iterable[str] = (), *, smoke: bool = False, seed: int | None = None) -> Loaded:
    """Read a recipe, lay its parents under it and the overrides over it, and validate.

    Args:
        config: a path, or a name of the catalogue (``orq``, ``orq.yaml``, ``quantize/orq``).
        verb: the verb asked for; None takes it from the recipe.
        overrides: ``key=value`` with dotted keys and YAML values.
        smoke: apply the recipe's ``smoke`` overrides first.
        seed: replaces the recipe's seed.

    Raises:
        RecipeError: anything wrong, all at once.
    """
    overrides = tuple(overrides)
    path, implied = catalog.find(config, verb)
    raw, text = catalog.merged(path)
    family = _family(raw, implied, verb, config)
    recipe = build(family, raw, overrides, smoke=smoke, seed=seed)
    return Loaded(recipe, family.verb, path.stem, path, text, overrides)


def build(family: Family, raw: dict[str, Any], overrides: Iterable[str] = (), *, smoke: bool = False, seed: int | None = None) -> Recipe:
    """The validated recipe of a mapping that has no ``extends`` left."""
    raw = copy.deepcopy(raw)
    if smoke:
        given = raw.get("smoke", {})
        if not isinstance(given, dict):
            raise RecipeError(Issue("smoke", "must be a mapping of dotted keys to values", given))
        for key, value in sorted(given.items(), key=lambda item: not item[0].endswith("name")):
            set_key(raw, key, value)
        raw["scale"] = "smoke"
    apply(raw, overrides)
    if seed is not None:
        raw["seed"] = seed
    if (said := raw.get("verb") or family.verb) != family.verb:
        raise RecipeError(Issue("verb", f"cannot be changed: this is a recipe of `{family.verb}`", said, "xutrain ls recipes"))
    try:
        return validate(recipe_class(family), raw, family.verb)
    except RecipeError as error:
        said = _leaves(raw["smoke"]) if smoke and raw.get("smoke") else set()
        raise RecipeError(*(replace(i, where=f"smoke.{i.where}") if i.where in said else i for i in error.issues)) from None


def _leaves(value: dict[str, Any]) -> set[str]:
    """Dotted names of everything that a section of overrides sets."""
    below = [{f"{key}.{leaf}" for leaf in _leaves(item)} if isinstance(item, dict) and item else {key} for key, item in value.items()]
    return set().union(*below)


def from_dict(verb: str, mapping: dict[str, Any], **kwargs: Any) -> Recipe:
    """Validate a recipe given as a mapping."""
    return build(FAMILIES[verb], mapping, **kwargs)


def recipe_class(family: Family) -> type[Recipe]:
    """The recipe class of a verb. Raises RecipeError where the verb is not built."""
    if not family.built:
        raise RecipeError(
            Issue(family.verb, "this verb is not part of this version yet", has_value=False, hint="xutrain --help lists what is")
        )
    module, name = family.recipe.split(":")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, Recipe)
    return cls


def _family(raw: dict[str, Any], implied: str | None, verb: str | None, config: str) -> Family:
    said = raw.get("verb") or implied or verb
    if not isinstance(said, str) or said not in FAMILIES:
        raise RecipeError(
            Issue(
                "verb",
                "must be one of " + ", ".join(FAMILIES),
                said,
                "write `verb: quantize` into the recipe, or name it on the command line",
            )
        )
    if verb is not None and said != verb:
        raise RecipeError(Issue("--config", f"is a recipe of `{said}`, not of `{verb}`", config, f"xutrain {said} --config {config}"))
    return FAMILIES[said]


def apply(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Lay ``key=value`` texts over a mapping; a changed ``name`` clears the options of the part it replaces."""
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or any(not part for part in key.strip().split(".")):
            near = f"{key.strip()}=VALUE" if key.strip() and not equals else "train.epochs=3"
            raise RecipeError(Issue("override", "must be KEY=VALUE with a dotted key", text, f"for example {near}"))
        pairs.append((key.strip(), yamlfile.parse(value, f"override {key.strip()}") if value.strip() else None))
    for key, parsed in sorted(pairs, key=lambda pair: not pair[0].endswith(".name")):
        set_key(raw, key, parsed)


def set_key(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one dotted key. Raises RecipeError where the path runs through a list or a plain value."""
    *parents, last = dotted.split(".")
    here = raw
    for depth, part in enumerate(parents):
        below: Any = here.get(part)
        if isinstance(below, str):  # `codec: orq` stands for {name: orq}
            below = {"name": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            where = ".".join(parents[: depth + 1])
            raise RecipeError(Issue(dotted, f"{where} is not a mapping", below, f"replace it whole: {where}=[...]"))
        here[part] = below
        here = below
    if last == "name" and parents and isinstance(here.get("name"), str) and here["name"] != value:
        here.clear()
    here[last] = catalog.lay_over({last: here[last]}, {last: value})[last] if last in here else value  # another name starts afresh
