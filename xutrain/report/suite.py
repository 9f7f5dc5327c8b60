"""A suite: one table or figure as recipe x grid of overrides x seeds, at the scales `cpu` and `paper`. Torch-free."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from xutrain.errors import Issue, RecipeError, UsageError
from xutrain.recipe import catalog, yamlfile
from xutrain.recipe.explain import issues_of
from xutrain.registry import Options, suggest

SCALES = ("cpu", "paper")
M = TypeVar("M", bound=Options)


class Line(Options):
    """A row or a column of the table."""

    label: str = Field("", description="what the table prints; the key where it is left out")
    recipe: str | None = Field(None, description="recipe of these cells, as verb/name")
    set: dict[str, Any] = Field(default_factory=dict, description="overrides of these cells: dotted keys and values")
    note: str = Field("", description="a remark, shown where a reader points at the label")
    may_diverge: bool = Field(False, description="divergence is a possible outcome and no fault")
    metric: str | None = Field(None, description="of a column: the number that its cells are about, where it is not the suite's")
    at: float | None = Field(None, description="of a column: where it stands on the horizontal axis of plots of kind columns")


class Plot(Options):
    """One picture: a metric against what it cost."""

    y: str = Field(description="a metric that runs log; for points and columns a final metric")
    x: str = Field(
        "bits", description="curve: bits, step, epoch, round or time; points: bits or a final metric; columns: the axis in words"
    )
    kind: Literal["curve", "points", "columns"] = Field("curve", description="columns: one line a row, over the columns' `at`")
    log_x: bool = Field(False, description="logarithmic horizontal axis")
    log_y: bool = Field(False, description="logarithmic vertical axis")
    columns: list[str] | None = Field(None, description="columns drawn, one panel each (kind columns: all in one); null: all")
    title: str = ""


class Suite(Options):
    """A suite at one scale, everything merged."""

    summary: str = Field(description="one line for listings")
    title: str = Field("", description="heading in a report")
    paper: str = Field("", description="arXiv number")
    group: str = Field("", description="the paper's short name: `xutrain sweep GROUP` runs its suites")
    where: str = Field("", description="table, figure or section of the paper")
    recipe: str | None = Field(None, description="recipe of every cell whose row and column name none")
    set: dict[str, Any] = Field(default_factory=dict, description="overrides of every cell")
    rows: dict[str, Line] = Field(description="rows: usually methods")
    columns: dict[str, Line] = Field(default_factory=lambda: {"all": Line()}, description="columns: usually settings")
    skip: list[str] = Field(default_factory=list, description="cells left out, as row/column")
    seeds: list[int] = Field(default_factory=lambda: [0], description="seeds of every cell")
    metric: str = Field("test_accuracy", description="the number that the table is about")
    better: Literal["higher", "lower"] = "higher"
    show: list[str] = Field(default_factory=list, description="further final metrics, beside the main one")
    plots: list[Plot] = Field(default_factory=list, description="pictures")
    notes: list[str] = Field(default_factory=list, description="what a reader of the table must know")
    minutes: float | None = Field(None, gt=0, description="CPU minutes of all cells and seeds on one core, as measured; for estimates")

    def metric_of(self, column: str) -> str:
        """The number that the cells of a column are about."""
        return (self.columns[column].metric if column in self.columns else None) or self.metric


@dataclass(frozen=True)
class Cell:
    """One experiment of a suite, without its seed."""

    row: str
    column: str
    recipe: str
    overrides: tuple[str, ...]
    spec: str

    @property
    def key(self) -> str:
        return f"{self.row}/{self.column}"


@dataclass(frozen=True)
class Table:
    """A suite at a scale with its cells."""

    name: str
    scale: str
    smoke: bool
    suite: Suite
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]

    @property
    def manifest(self) -> str:
        return f"{self.name}.{self.scale}{'.smoke' if self.smoke else ''}.json"


def files() -> dict[str, Path]:
    """Suite name -> file, nearest configs folder first."""
    found: dict[str, Path] = {}
    for root in catalog.roots():
        for path in sorted((root / "suites").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def groups() -> dict[str, list[str]]:
    """Group -> its suites, in order."""
    found: dict[str, list[str]] = {}
    for name, path in sorted(files().items()):
        group = yamlfile.read(path)[0].get("group")
        if isinstance(group, str) and group:
            found.setdefault(group, []).append(name)
    return found


def select(names: list[str]) -> list[str]:
    """Suite names that ``names`` (suites, groups, paths or ``all``) mean, each once.

    Raises:
        UsageError: a name that is neither; names the nearest.
    """
    known, grouped = files(), groups()
    chosen: list[str] = []
    for name in names:
        if name == "all":
            found = [s for members in grouped.values() for s in members]
        elif name in grouped:
            found = grouped[name]
        elif name.removesuffix(".yaml") in known or Path(name).is_file():
            found = [name if Path(name).is_file() else name.removesuffix(".yaml")]
        else:
            near = suggest(name, [*known, *grouped])
            raise UsageError(Issue("SUITE", "no such suite", name, f"did you mean {near}?" if near else "all of them: xutrain ls suites"))
        chosen += [s for s in found if s not in chosen]
    if not chosen:
        raise UsageError(Issue("SUITE", "selects nothing", " ".join(names), "all suites: xutrain ls suites"))
    return chosen


def has_scale(name: str, scale: str) -> bool:
    """Whether a suite says anything at a scale."""
    return scale in (yamlfile.read(_path(name))[0].get("scales") or {})


def _path(name: str) -> Path:
    return Path(name) if Path(name).is_file() else files()[name]


def open_table(
    name: str, scale: str = "cpu", *, smoke: bool = False, seeds: list[int] | None = None, only: list[str] | None = None
) -> Table:
    """Read a suite at a scale.

    Args:
        name: a suite's name or path.
        scale: ``cpu`` or ``paper``.
        smoke: the cells' recipes with their smoke overrides.
        seeds: replace the suite's.
        only: patterns of rows or of row/column; others are left out.

    Raises:
        RecipeError: the file cannot be right (unknown key, unknown recipe, a seed twice, no cells), all issues at once.
        UsageError: the suite has no such scale, or ``only`` selects nothing.
    """
    path = _path(name)
    raw = yamlfile.read(path)[0]
    scales = raw.pop("scales", None)
    if not isinstance(scales, dict) or not scales or not set(scales) <= set(SCALES):
        raise RecipeError(Issue(f"{path}: scales", "must be a mapping with the keys cpu, paper or both", scales))
    if scale not in scales:
        raise UsageError(Issue("--scale", f"{path.stem} has no such scale", scale, f"it has {', '.join(scales)}"))
    own = scales[scale] or {}
    if not isinstance(own, dict):
        raise RecipeError(Issue(f"{path}: scales.{scale}", "must be a mapping", own))
    merged = catalog.lay_over(raw, own)
    for key in ("rows", "columns"):  # `orq:` alone is a row without changes
        if isinstance(merged.get(key), dict):
            merged[key] = {k: v if v is not None else {} for k, v in merged[key].items()}
    suite = read_as(Suite, merged, str(path), {"rows": Line, "columns": Line})
    problems = _problems(suite, str(path), seeds)
    cells, wrong = _cells(suite, str(path), smoke)
    if problems or wrong:
        raise RecipeError(*problems, *wrong)
    if only:
        kept = tuple(c for c in cells if any(fnmatch.fnmatchcase(text, p) for p in only for text in (c.row, c.column, c.key)))
        if not kept:
            hint = "rows: " + ", ".join(suite.rows) + "; columns: " + ", ".join(suite.columns)
            raise UsageError(Issue("--only", "selects no cell", ",".join(only), hint))
        cells = kept
    return Table(path.stem, scale, smoke, suite, cells, tuple(seeds if seeds is not None else suite.seeds))


def read_as(cls: type[M], raw: dict[str, Any], path: str, tables: dict[str, type[Options]]) -> M:
    """Validate a file's mapping; ``tables`` are its sections of named entries. Raises RecipeError with all issues."""
    found: list[Issue] = []
    for section, entry in tables.items():
        values = raw.get(section)
        for key, value in values.items() if isinstance(values, dict) else ():
            try:
                entry.model_validate(value)
            except ValidationError as error:
                found += [_inside(issue, f"{path}: {section}.{key}.") for issue in issues_of(error, entry)]
    try:
        whole = cls.model_validate(raw)
    except ValidationError as error:
        told = () if found else tuple(tables)
        found += [_inside(i, f"{path}: ") for i in issues_of(error, cls) if told or i.where.split(".")[0] not in tables]
        raise RecipeError(*found) from None
    return whole


def _inside(issue: Issue, prefix: str) -> Issue:
    return Issue(f"{prefix}{issue.where}".rstrip("."), issue.what, issue.value, issue.hint, issue.has_value)


def metric_fault(name: str) -> str:
    """What is wrong with the name of a number, empty for a right one: see ``claims.value``."""
    kind, colon, rest = name.partition(":")
    parts = rest.split(":")
    if not colon or (kind == "curve_mean" and len(parts) == 1 and rest):
        return ""
    if kind == "reach" and len(parts) == 3 and all(parts) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", parts[1], re.IGNORECASE):
        return ""
    return "must be a metric, curve_mean:NAME or reach:NAME:LEVEL:AXIS"


def _problems(suite: Suite, path: str, seeds: list[int] | None) -> list[Issue]:
    found = []
    wanted = suite.seeds if seeds is None else seeds
    if len(set(wanted)) < len(wanted):
        found.append(Issue(f"{path}: seeds", "gives a seed twice, which would count one run as two samples", wanted))
    if any(not 0 <= seed < 2**31 for seed in wanted):
        found.append(Issue(f"{path}: seeds", "must lie between 0 and 2^31 - 1", wanted))
    said = [("metric", suite.metric), *(("show", m) for m in suite.show)]
    said += [(f"columns.{key}.metric", line.metric) for key, line in suite.columns.items() if line.metric]
    found += [Issue(f"{path}: {where}", fault, name) for where, name in said if (fault := metric_fault(name))]
    if not wanted:
        found.append(Issue(f"{path}: seeds", "is empty: there is nothing to run", wanted))
    for name, lines in (("rows", suite.rows), ("columns", suite.columns)):
        if not lines:
            found.append(Issue(f"{path}: {name}", "is empty: there is nothing to run", {}))
        found += [Issue(f"{path}: {name}.{key}", "a key must be without `/`", key) for key in lines if "/" in key]
    told = "a metric belongs to the suite or to a column"
    found += [Issue(f"{path}: rows.{key}.metric", told, line.metric) for key, line in suite.rows.items() if line.metric]
    for text in suite.skip:
        row, _, column = text.partition("/")
        if row not in suite.rows or column not in suite.columns:
            found.append(Issue(f"{path}: skip", "is not a cell (row/column)", text, suggest(row, list(suite.rows))))
    for number, plot in enumerate(suite.plots):
        found += [
            Issue(f"{path}: plots.{number}.columns", "no such column", c, "columns: " + ", ".join(suite.columns))
            for c in plot.columns or []
            if c not in suite.columns
        ]
        chosen = [suite.columns[c].at for c in plot.columns or suite.columns if c in suite.columns]
        if plot.kind == "columns" and sum(at is not None for at in chosen) < 2:
            hint = "give columns a number, such as `at: 0.5`"
            found.append(Issue(f"{path}: plots.{number}", "needs two columns that say where they stand", plot.x, hint))
        elif plot.kind == "columns" and plot.log_x and any(at is not None and at <= 0 for at in chosen):
            found.append(Issue(f"{path}: plots.{number}.log_x", "an axis with a number that is not positive cannot be logarithmic", True))
    return found


def _cells(suite: Suite, path: str, smoke: bool) -> tuple[tuple[Cell, ...], list[Issue]]:
    cells: list[Cell] = []
    wrong: dict[tuple[str, str], Issue] = {}
    sources: dict[str, dict[str, Any]] = {}
    for row, left in suite.rows.items():
        for column, right in suite.columns.items():
            if f"{row}/{column}" in suite.skip:
                continue
            if left.recipe and right.recipe:
                what = f"names a recipe, and so does columns.{column}"
                wrong[row, column] = Issue(
                    f"{path}: rows.{row}.recipe", what, left.recipe, "a cell has one recipe; put the difference under `set:`"
                )
                continue
            recipe = left.recipe or right.recipe or suite.recipe
            if recipe is None:
                wrong[row, column] = Issue(f"{path}: {row}/{column}", "names no recipe", has_value=False, hint="write recipe: verb/name")
                continue
            said = f"rows.{row}.recipe" if left.recipe else f"columns.{column}.recipe" if right.recipe else "recipe"
            try:
                if recipe not in sources:
                    sources[recipe] = catalog.merged(catalog.find(recipe)[0])[0]
                cells.append(_cell(row, column, recipe, sources[recipe], {**suite.set, **right.set, **left.set}, smoke))
            except RecipeError as error:
                for issue in error.issues:
                    where = said if issue.where == "--config" else issue.where
                    wrong[said, issue.what] = Issue(f"{path}: {where}", issue.what, issue.value, issue.hint, issue.has_value)
    return tuple(cells), list(wrong.values())


def _cell(row: str, column: str, recipe: str, source: dict[str, Any], values: dict[str, Any], smoke: bool) -> Cell:
    overrides = tuple(f"{k}={json.dumps(v)}" for k, v in sorted(values.items(), key=lambda item: item[0].count(".")))
    text = json.dumps([recipe, source, overrides, smoke], sort_keys=True)
    return Cell(row, column, recipe, overrides, hashlib.sha256(text.encode()).hexdigest()[:16])
