"""Which suites and claims a part (method, codec, data set, model) stands in, read from the files; for `xutrain show`."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from xutrain import registry
from xutrain.errors import XutrainError
from xutrain.recipe import catalog
from xutrain.report import published
from xutrain.report.suite import SCALES, Cell, files, has_scale, open_table

#: section of a recipe that chooses a part of this kind
SECTIONS = {"method": "method", "codec": "codec", "dataset": "data", "model": "model", "agent": "search.agent"}


def part_of(cell: Cell, source: dict[str, Any], kind: str) -> str:
    """The part of one kind that a cell with the recipe ``source`` runs, by its canonical name; empty for a default."""
    section = SECTIONS[kind]
    head, _, tail = section.partition(".")
    value = source.get(head)
    chosen = _named(value.get(tail) if tail and isinstance(value, dict) else None if tail else value)
    for override in cell.overrides:
        key, _, text = override.partition("=")
        if tail and key == head and not isinstance(json.loads(text), dict):
            chosen = ""
        if key in (section, f"{section}.name"):
            chosen = _named(json.loads(text)) or chosen
    return registry.canonical(chosen)


def _named(value: Any) -> str:
    found = value.get("name") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def suites_and_claims(kind: str, name: str, verbs: Collection[str] = ()) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Suites with the rows that run the part under one of ``verbs`` (none: any), and the claims that name such a row.

    Returns:
        ({"suite", "rows", "scales"}, ...) and ({"id", "text", "source", "suite", "must_hold"}, ...), both in the order of the files.
    """
    rows: dict[str, dict[str, set[str]]] = {}
    recipes: dict[str, tuple[str | None, dict[str, Any]]] = {}
    for suite in files():
        for scale in SCALES:
            if not has_scale(suite, scale):
                continue
            try:
                cells = open_table(suite, scale).cells
            except XutrainError:  # a suite with a fault says so itself, in `xutrain sweep`
                continue
            for cell in cells:
                if cell.recipe not in recipes:
                    path, of = catalog.find(cell.recipe)
                    recipes[cell.recipe] = of, catalog.merged(path)[0]
                of, source = recipes[cell.recipe]
                if (not verbs or of is None or of in verbs) and part_of(cell, source, kind) == name:
                    rows.setdefault(suite, {}).setdefault(cell.row, set()).add(scale)
    suites = [{"suite": s, "rows": list(found), "scales": sorted(set.union(*found.values()))} for s, found in rows.items()]
    claims = [
        {"id": f"{paper.name}.{key}", "text": claim.text, "source": claim.source, "suite": claim.suite, "must_hold": list(claim.must_hold)}
        for paper in published.papers()
        for key, claim in paper.content.claims.items()
        if any(isinstance(side, published.Side) and side.row in rows.get(claim.suite, {}) for side in (claim.left, claim.right))
    ]
    return suites, claims
