"""What papers say: numbers that were seen, with where, and claims that a suite can decide. Data in configs/published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from xutrain.errors import Issue, RecipeError
from xutrain.recipe import catalog, yamlfile
from xutrain.registry import Options
from xutrain.report.suite import metric_fault, read_as


class Number(Options):
    """A published number."""

    value: float
    std: float | None = None
    note: str = ""


class PublishedTable(Options):
    """Numbers of one table; rows and columns are keys of the suite."""

    where: str = Field(description="table, figure or page")
    source: str = Field(description="the text in which the numbers were read")
    suite: str = Field(description="the suite that reproduces the table")
    metric: str = Field(description="what the numbers are, as a final metric of the runs")
    scale: Literal["cpu", "paper"] = Field("paper", description="the scale at which the numbers themselves should come out")
    tolerance: float = Field(0.0, ge=0, description="difference that still counts as a match, where the paper gives no deviation")
    cells: dict[str, dict[str, float | Number]]

    def number(self, row: str, column: str) -> Number | None:
        found = self.cells.get(row, {}).get(column)
        return Number(value=float(found)) if isinstance(found, (int, float)) else found


class Side(Options):
    """One side of a claim: a metric of a row, in one column or in each."""

    row: str
    column: str | None = Field(None, description="null: every column that both sides have")
    metric: str | None = Field(None, description="a final metric, curve_mean:NAME, or a bits_ key; null: the suite's metric")
    times: float = 1.0


class Claim(Options):
    """Something that a paper states and a suite decides: left OP right."""

    text: str = Field(description="the statement")
    source: str = Field(description="where it is stated, or from what it follows")
    suite: str
    kind: Literal["ordering", "exact"] = Field(
        "ordering", description="ordering: of means over seeds; exact: for every single run, closed form"
    )
    left: Side
    op: Literal[">=", "<=", ">", "<", "=="]
    right: Side | float | int
    margin: float = Field(
        0.0, description="how far the wrong way still holds; negative: how far the right way it must go; for == how far apart"
    )
    sigma: float = Field(0.0, ge=0, description="standard errors of the paired difference that a strict ordering needs")
    must_hold: list[Literal["cpu", "paper"]] = Field(description="scales at which `report --check` fails without it")
    note: str = ""


class Published(Options):
    """One paper."""

    id: str = Field(description="arXiv number")
    title: str
    authors: str = ""
    venue: str = ""
    unseen: str = Field("", description="what of the paper's numbers could not be read")
    tables: dict[str, PublishedTable] = Field(default_factory=dict)
    claims: dict[str, Claim] = Field(default_factory=dict)


@dataclass(frozen=True)
class Paper:
    """A published file."""

    name: str
    path: Path
    content: Published

    def tables_of(self, suite: str) -> dict[str, PublishedTable]:
        return {k: t for k, t in self.content.tables.items() if t.suite == suite}

    def claims_of(self, suite: str) -> dict[str, Claim]:
        return {k: c for k, c in self.content.claims.items() if c.suite == suite}


def papers() -> list[Paper]:
    """Every file of configs/published, by name. Raises RecipeError for a file that cannot be right."""
    found: dict[str, Path] = {}
    for root in catalog.roots():
        for path in sorted((root / "published").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return [Paper(name, path, read(path)) for name, path in sorted(found.items())]


def read(path: Path) -> Published:
    """One file. Raises RecipeError with all of its issues."""
    raw: dict[str, Any] = yamlfile.read(path)[0]
    value = read_as(Published, raw, str(path), {"tables": PublishedTable, "claims": Claim})
    if not value.tables and not value.unseen:
        hint = "write `unseen: no table of the paper could be read`, or give tables"
        raise RecipeError(Issue(str(path), "has no numbers and does not say that none were seen", has_value=False, hint=hint))
    wrong = [
        Issue(f"{path}: claims.{key}.{where}.metric", fault, side.metric)
        for key, claim in value.claims.items()
        for where, side in (("left", claim.left), ("right", claim.right))
        if isinstance(side, Side) and side.metric and (fault := metric_fault(side.metric))
    ]
    if wrong:
        raise RecipeError(*wrong)
    return value
