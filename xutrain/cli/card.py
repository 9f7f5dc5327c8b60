"""The card of a part, `xutrain show method NAME`: what the header of its file says, its options, and where it is used."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from xutrain import registry
from xutrain.cli import console
from xutrain.recipe import catalog

_CITED = re.compile(r"\b(eqs?\.|equations?|algorithms?)\s*\(?[A-Z]?\d", re.IGNORECASE)
_LIMIT = re.compile(r"\b(limits?|degenerates)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d{4}\.\d{4,5}")


def show_part(kind: str, name: str, verb: str | None, schema: bool, json: bool) -> None:
    """Print the card of a method, codec, data set, model or agent. Raises RecipeError for a name that is none."""
    kind = _kind(kind, name, verb)
    entry = registry.find(kind, name, verb=verb, where=kind)
    cls = registry.load(kind, name, verb=verb, where=kind)
    described = cls.Options.model_json_schema()
    if schema:
        console.print_json(described)
        return
    from xutrain.report.uses import suites_and_claims

    module = __import__(cls.__module__, fromlist=["x"])
    text = (module.__doc__ or cls.__doc__ or "").strip()
    verbs = (verb,) if verb else entry.verbs
    suites, claims = suites_and_claims(kind, entry.name, verbs)
    card: dict[str, Any] = {
        "kind": kind,
        "name": entry.name,
        "aliases": list(entry.aliases),
        "verbs": list(entry.verbs),
        "also": [v for e in registry.entries(kind) if e.name == entry.name and e.verbs != entry.verbs for v in e.verbs if verb is None],
        "paper": entry.paper,
        "summary": entry.summary,
        "file": "/".join(cls.__module__.split(".")) + ".py",
        "text": text,
        "equation": equation(text),
        "limits": limits(text),
        "options": [_option(n, p, described) for n, p in described.get("properties", {}).items() if n != "name"],
        "recipes": [f"{r.verb}/{r.name}" for r in catalog.listing() if (not verbs or r.verb in verbs) and _uses(r.path, kind, entry.name)],
        "suites": suites,
        "claims": claims,
        **_search(kind, entry, cls),
    }
    if json:
        console.print_json(card)
        return
    console.out.print(f"{kind} {entry.name}" + (f"   {cited(entry.paper)}" if entry.paper else ""), style="bold", markup=False)
    console.out.print(card["text"] or entry.summary, markup=False)
    console.out.print(f"file: {card['file']}\n", markup=False)
    for owner in card["also"]:
        console.out.print(f"another {entry.name}: xutrain show {kind} {entry.name} --verb {owner}", markup=False)
    if card["options"]:
        console.table(["option", "type", "default", "bounds", "meaning"], [list(o.values()) for o in card["options"]])
    if card.get("searchable"):
        console.out.print("an agent may search: " + ", ".join(card["searchable"]) + "   (search.space; xutrain ls agents)", markup=False)
    if card.get("search"):
        console.out.print("beside it in the section search:", markup=False)
        console.table(["option", "type", "default", "bounds", "meaning"], [list(o.values()) for o in card["search"]])
    if card["recipes"]:
        console.out.print("recipes: " + ", ".join(card["recipes"]), markup=False)
    for found in suites:
        console.out.print(f"suite {found['suite']} ({', '.join(found['scales'])}): rows {', '.join(found['rows'])}", markup=False)
    for claim in claims:
        where = ", ".join(claim["must_hold"]) or "no scale"
        console.out.print(f"claim: {claim['text']} (must hold at {where}; suite {claim['suite']}; {claim['source']})", markup=False)


def _kind(kind: str, name: str, verb: str | None) -> str:
    """``codec`` where a codec's name is asked for as a method: ORQ is what its paper calls one."""
    wanted = registry.canonical(name)
    if kind == "method" and not _called(wanted, kind, verb) and _called(wanted, "codec", verb):
        return "codec"
    return kind


def _called(wanted: str, kind: str, verb: str | None) -> bool:
    return any(wanted == e.name or wanted in e.aliases for e in registry.entries(kind, verb))


def cited(paper: str) -> str:
    """``arXiv 2002.11082``; what is no arXiv number stays as it is."""
    return f"arXiv {paper}" if _NUMBER.fullmatch(paper) else paper


def equation(text: str) -> str:
    """What a header computes: the sentence that cites an equation's or algorithm's number, if one does, and its indented lines."""
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*filter(None, [_sentence(text, _CITED)]), *textwrap.dedent("\n".join(lines)).splitlines()])


def limits(text: str) -> str:
    """The degenerate cases that a header names, without the word that opens the paragraph."""
    opened = next((part for part in re.split(r"\n\s*\n", text) if re.match(r"Limits?: ", part)), text)
    return re.sub(r"^Limits?: ", "", _sentence(opened, _LIMIT))


def _sentence(text: str, wanted: re.Pattern[str]) -> str:
    """The paragraph of a header that says something, from the sentence that says it; a citation is that sentence alone."""
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        parts = re.split(r"(?<=[.;]) (?=[A-Z])", flat)
        found = [i for i, part in enumerate(parts) if wanted.search(part)]
        if found:
            return " ".join(parts[found[0] :] if wanted is _LIMIT else [parts[found[0]]])
    return ""


def _search(kind: str, entry: registry.Entry, cls: Any) -> dict[str, Any]:
    """Of a federated method: what an agent may search; of an agent: the options of the section that it stands in."""
    from xutrain.recipe import search

    if kind == "method" and "federate" in entry.verbs:
        return {"searchable": ["lr", "local_work", "weights", *search.searchable(cls.Options)]}
    if kind != "agent":
        return {}
    found = []
    schema = search.Search.model_json_schema()
    for name, prop in schema["properties"].items():
        if name not in ("agent", "space"):
            found.append(_option(name, prop, schema))
    for part in (search.ClientRange, search.Work, search.Weights):
        inner = part.model_json_schema()
        where = {"ClientRange": "space.lr", "Work": "space.local_work", "Weights": "space.weights"}[part.__name__]
        new = [n for n in part.model_fields if part is search.ClientRange or n in part.__annotations__]
        found += [_option(f"{where}.{n}", inner["properties"][n], inner) | {"option": f"{where}.{n}"} for n in new]
    return {"search": found}


def _option(name: str, prop: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    kinds = [p for p in prop.get("anyOf", [prop]) if p.get("type") != "null"]
    first = kinds[0] if kinds else {}
    words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " ".join(f"{sign} {first[key]:g}" for key, sign in words.items() if key in first)
    choices = " | ".join(map(str, first.get("enum", []))) or str(first.get("const", ""))
    required = name in schema.get("required", [])
    default = "required" if required else prop.get("default")
    return {
        "option": name,
        "type": choices or first.get("type", "section"),
        "default": default,
        "bounds": bounds,
        "meaning": prop.get("description", ""),
    }


def _uses(path: str, kind: str, name: str) -> bool:
    key = {"dataset": "data"}.get(kind, kind)
    section = catalog.merged(Path(path))[0].get(key)
    if kind == "agent":
        search = catalog.merged(Path(path))[0].get("search")
        section = search.get("agent") if isinstance(search, dict) else None
    said = section.get("name") if isinstance(section, dict) else section
    return isinstance(said, str) and registry.canonical(said) == name
