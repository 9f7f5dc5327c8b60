"""Where recipes are: a path, `configs/<verb>/` of this folder or of the checkout, or the recipes inside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xutrain.errors import Issue, RecipeError
from xutrain.families import FAMILIES
from xutrain.recipe import yamlfile
from xutrain.registry import suggest

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Listed:
    """A recipe of the catalogue."""

    verb: str
    name: str
    path: str
    scale: str
    summary: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def roots() -> list[Path]:
    """Folders that hold configs/<verb>/*.yaml, nearest first."""
    places = [Path.cwd() / "configs", _PACKAGE.parent / "configs", _PACKAGE / "configs"]
    found: list[Path] = []
    for place in places:
        if any((place / verb).is_dir() for verb in FAMILIES) and place.resolve() not in [f.resolve() for f in found]:
            found.append(place)
    return found


def find(config: str, verb: str | None = None) -> tuple[Path, str | None]:
    """The file of a recipe and the verb that its place in the catalogue implies (None for a path elsewhere).

    Raises:
        RecipeError: nothing is called so (names the nearest), or it belongs to another verb.
    """
    path = Path(config).expanduser()
    if _is_file(path):
        return path, _verb_of(path)
    stem = config.removesuffix(".yaml").removesuffix(".yml").strip("/")
    of, _, name = stem.partition("/")
    if of in FAMILIES and name:  # verb/name: no need to list everything
        for root in roots():
            if _is_file(place := root / of / f"{name}.yaml"):
                return place, of
    known = dict(_files())
    if "/" in stem and tuple(stem.rsplit("/", 1)) in known:
        named_verb, name = stem.rsplit("/", 1)
        return known[named_verb, name], named_verb
    homes = [v for v, n in known if n == stem]
    if verb is None and len(homes) == 1:
        return known[homes[0], stem], homes[0]
    if verb in homes:
        return known[verb, stem], verb
    if homes:
        if verb is None:
            raise RecipeError(Issue("--config", f"is a recipe of several verbs: {', '.join(homes)}", config, f"say {homes[0]}/{stem}"))
        raise RecipeError(
            Issue("--config", f"is a recipe of `{homes[0]}`, not of `{verb}`", config, f"xutrain {homes[0]} --config {config}")
        )
    if _is_file(beside := path.with_name(f"{path.name}.yaml") if path.name else path):
        return beside, _verb_of(beside)
    names = [n if verb else f"{v}/{n}" for v, n in known if verb in (None, v)]
    near = suggest(stem.rsplit("/", 1)[-1] if verb else stem, names)
    listing = "xutrain ls recipes"
    hint = f"did you mean {near}? all of them: {listing}" if near else f"all of them: {listing}"
    raise RecipeError(Issue("--config", "no such file and no recipe of that name" + (f" under {verb}" if verb else ""), config, hint))


def listing(verb: str | None = None) -> list[Listed]:
    """Every recipe of the catalogue, by verb and name."""
    found = []
    for (of, name), path in sorted(_files()):
        if verb in (None, of):
            raw, _ = merged(path)
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            found.append(Listed(of, name, str(shown), str(raw.get("scale", "cpu")), str(raw.get("summary", ""))))
    return found


def _files() -> Iterator[tuple[tuple[str, str], Path]]:
    seen = set()
    for root in roots():
        for verb in FAMILIES:
            for path in sorted((root / verb).rglob("*.yaml")):
                key = (verb, str(path.relative_to(root / verb).with_suffix("")))
                if key not in seen:
                    seen.add(key)
                    yield key, path


def _verb_of(path: Path) -> str | None:
    """The verb whose configs folder holds ``path``."""
    for root in roots():
        if path.resolve().is_relative_to(root.resolve()):
            first = path.resolve().relative_to(root.resolve()).parts[0]
            return first if first in FAMILIES else None
    return None


def merged(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """The mapping of a recipe file laid over those that it extends, and the file's own text."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise RecipeError(Issue(f"{path}: extends", f"goes in a circle: {names}", has_value=False))
    raw, text = yamlfile.read(path)
    parents = raw.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise RecipeError(Issue(f"{path}: extends", "must be a file name or a list of them", parents))
    base: dict[str, Any] = {}
    for parent in parents:
        base = lay_over(base, merged(_parent(path, parent), (*chain, path.resolve()))[0])
    return lay_over(base, raw), text


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _parent(path: Path, name: str) -> Path:
    wanted = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    for place in (path.parent, *roots()):
        if _is_file(place / wanted):
            return place / wanted
    hint = "a path relative to the recipe, or to configs/ (such as base/digits.yaml)"
    raise RecipeError(Issue(f"{path}: extends", "no such recipe", name, hint))


def lay_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``: mappings merge, lists are replaced, and a section with another ``name`` starts afresh."""
    result = dict(base)
    for key, value in top.items():
        below = {"name": result[key]} if isinstance(result.get(key), str) and isinstance(value, dict) else result.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and value.get("name", below.get("name")) == below.get("name"):
            result[key] = lay_over(below, value)
        else:
            result[key] = value
    return result
