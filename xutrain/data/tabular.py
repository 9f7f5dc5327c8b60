"""Feature-partitioned tables: what the parties of a vertical experiment hold, and how their files are read.

Row i is the same entity at every party. Dense blocks are float64 arrays, sparse ones CSR. No torch here: a party's process starts fast.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from xutrain.errors import DataError, Issue

Matrix: TypeAlias = NDArray[np.float64] | sparse.csr_matrix
TASKS = ("binary", "regression", "classes")


@dataclass
class PartyBlock:
    """One party's columns: training rows, test rows (maybe none), and what was done to the raw columns."""

    name: str
    columns: list[str]
    train: Matrix
    test: Matrix
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass
class VerticalData:
    """A feature-partitioned data set.

    Attributes:
        parties: one block per party, all with the same rows.
        y, y_test: labels; -1/+1 (binary), float (regression) or 0..C-1 (classes).
        task: "binary", "regression" or "classes"; classes is C, else 0.
        label_holder: name of the party that owns the label column.
        synthetic: True when the samples are generated; every result then says so.
        notes: facts about the reading that a user should see (index base, rows dropped).
    """

    name: str
    parties: list[PartyBlock]
    y: NDArray
    y_test: NDArray
    task: str
    label_holder: str = ""
    classes: int = 0
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.y)

    def pooled(self) -> VerticalData:
        """The same samples with all columns in one party."""
        first = self.parties[0]
        stack = sparse.hstack if sparse.issparse(first.train) else np.hstack
        as_matrix = sparse.csr_matrix if sparse.issparse(first.train) else np.ascontiguousarray
        both = [as_matrix(stack([getattr(p, split) for p in self.parties])) for split in ("train", "test")]
        block = PartyBlock("pooled", [c for p in self.parties for c in p.columns], both[0], both[1])
        return VerticalData(self.name, [block], self.y, self.y_test, self.task, "pooled", self.classes, self.synthetic, self.notes)


def split_columns(d: int, parties: int, where: str = "data.parties") -> list[range]:
    """Contiguous blocks of d columns; the first (d mod parties) get one more. Raises DataError when a party would be empty."""
    if d < parties:
        raise DataError(
            Issue(where, f"{d} features cannot be split over {parties} parties: some would hold none", parties, f"at most {d} parties")
        )
    size, more = divmod(d, parties)
    starts = [p * size + min(p, more) for p in range(parties + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def split_rows(ids: Sequence[str], fraction: float, salt: str = "test") -> NDArray[np.bool_]:
    """True for test rows: a hash of the id decides, so every party splits alike without talking. Shape (n,)."""
    limit = int(fraction * 2**32)
    return np.array(
        [int.from_bytes(hashlib.blake2b(f"{salt}|{i}".encode(), digest_size=4).digest(), "little") < limit for i in ids], dtype=bool
    )


def binary_labels(values: NDArray, where: str) -> NDArray[np.float64]:
    """Labels as -1/+1; accepts {0, 1} and {-1, +1}. Raises DataError otherwise."""
    found = sorted(set(np.asarray(values, dtype=np.float64).tolist()))
    if set(found) <= {0.0, 1.0} or set(found) <= {-1.0, 1.0}:
        return np.where(np.asarray(values) > 0, 1.0, -1.0)
    raise DataError(
        Issue(where, "logistic labels must be 0/1 or -1/+1", found[:6], "map the column first, or choose loss: ridge or softmax")
    )


@dataclass
class Table:
    """A party's file: ids, labels if it has them, and named columns of text cells (CSV) or a matrix (LIBSVM, with how it was read)."""

    path: Path
    ids: list[str]
    columns: dict[str, list[str]]
    label: list[str] | None
    matrix: sparse.csr_matrix | None = None
    form: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def read_csv(path: Path, id_column: str, label: str = "") -> Table:
    """Read a CSV with a header and an id column.

    Raises:
        DataError: missing file or column, a row of the wrong width, a duplicate or empty id; names the file and the row (line number).
    """
    if not path.is_file():
        raise DataError(Issue(str(path), "no such file", hint="give a party's CSV with --data or data.files", has_value=False))
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        header = next(reader, [])
        if id_column not in header:
            raise DataError(Issue(str(path), "no such id column", id_column, f"columns: {', '.join(header[:20])}"))
        rows: list[list[str]] = []
        seen: dict[str, int] = {}
        at_id = header.index(id_column)
        for row in reader:
            line = reader.line_num
            if len(row) != len(header):
                raise DataError(Issue(f"{path}:{line}", f"{len(row)} cells, the header has {len(header)}", row[:3]))
            if not row[at_id].strip():
                raise DataError(Issue(f"{path}:{line}", "empty id", row[:3]))
            if row[at_id] in seen:
                raise DataError(
                    Issue(f"{path}:{line}", f"duplicate id, first seen in line {seen[row[at_id]]}", row[at_id], "one row per entity")
                )
            seen[row[at_id]] = line
            rows.append(row)
    cells = {name: [row[at] for row in rows] for at, name in enumerate(header)}
    ids = cells.pop(id_column)
    return Table(path, ids, cells, cells.pop(label, None) if label else None)


def label_values(table: Table, task: str, label: str) -> NDArray:
    """The label column as numbers. Raises DataError naming file and row."""
    assert table.label is not None
    values = np.array([_number(cell, table.path, at, label) for at, cell in enumerate(table.label)])
    if np.isnan(values).any():
        at = int(np.flatnonzero(np.isnan(values))[0])
        raise DataError(Issue(f"{table.path}:{at + 2}", "missing label", table.label[at], "drop rows without a label"))
    if task == "binary":
        return binary_labels(values, f"{table.path}: column {label}")
    return values.astype(np.int64) if task == "classes" else values


def _number(cell: str, path: Path, at: int, column: str) -> float:
    if cell.strip().lower() in MISSING:
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        raise DataError(Issue(f"{path}:{at + 2}", f"column {column} is not a number", cell)) from None


MISSING = frozenset({"", "na", "nan", "null", "?"})


def fit_preprocessing(
    columns: dict[str, list[str]], missing: str, rows: NDArray[np.int64], path: Path, row_lines: Sequence[int] | None = None
) -> dict[str, Any]:
    """Learn one-hot levels, means and scales on ``rows`` (the training rows); kept in the party's model file.

    ``missing``: "error" names the first empty cell; "mean" puts the training mean of numbers, and a level of its own for text.
    """
    steps: dict[str, Any] = {"missing": missing, "columns": {}}
    for name, cells in columns.items():
        gaps = [at for at, cell in enumerate(cells) if cell.strip().lower() in MISSING]
        if gaps and missing == "error":
            line = (row_lines[gaps[0]] if row_lines is not None else gaps[0]) + 2
            raise DataError(
                Issue(
                    f"{path}:{line}",
                    f"empty or NaN cell in column {name} ({len(gaps)} in all)",
                    cells[gaps[0]],
                    "clean the file or set data.missing=mean",
                )
            )
        numbers = _as_numbers(cells)
        if numbers is None:
            levels = sorted({cells[i].strip() or "missing" for i in rows})
            hot = np.array([[cells[i].strip() or "missing"] for i in rows]) == np.array(levels)
            steps["columns"][name] = {"levels": levels, "mean": hot.mean(axis=0).tolist(), "scale": _scale(hot.std(axis=0)).tolist()}
        else:
            seen = numbers[rows][~np.isnan(numbers[rows])]
            if not np.isfinite(seen).all():
                raise DataError(Issue(str(path), f"column {name} holds an infinite value", hint="clean the file", has_value=False))
            mean = float(seen.mean()) if len(seen) else 0.0
            steps["columns"][name] = {"mean": [mean], "scale": _scale(np.array([seen.std() if len(seen) else 0.0])).tolist()}
    return steps


def apply_preprocessing(columns: dict[str, list[str]], steps: dict[str, Any], where: str) -> tuple[NDArray[np.float64], list[str]]:
    """Standardised dense block and its column names; unseen levels are zeros. Raises DataError for other columns."""
    if list(columns) != list(steps["columns"]):
        missing = [c for c in steps["columns"] if c not in columns]
        extra = [c for c in columns if c not in steps["columns"]]
        raise DataError(
            Issue(
                where,
                "columns differ from those of the model",
                {"missing": missing, "extra": extra},
                "use the same file layout as in training",
            )
        )
    parts, names = [], []
    for name, step in steps["columns"].items():
        if "levels" in step:
            raw = (np.array([[c.strip() or "missing"] for c in columns[name]]) == np.array(step["levels"])).astype(np.float64)
            names += [f"{name}={level}" for level in step["levels"]]
        else:
            numbers = _as_numbers(columns[name])
            if numbers is None:
                raise DataError(
                    Issue(where, f"column {name} was numeric in training and now holds text", hint="check the file", has_value=False)
                )
            raw = np.where(np.isnan(numbers), step["mean"][0], numbers)[:, None]
            names.append(name)
        parts.append((raw - np.array(step["mean"])) / np.array(step["scale"]))
    return np.ascontiguousarray(np.hstack(parts)), names


def _as_numbers(cells: Iterable[str]) -> NDArray[np.float64] | None:
    try:
        return np.array([np.nan if c.strip().lower() in MISSING else float(c) for c in cells])
    except ValueError:
        return None


def _scale(std: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divisor of a column; a constant column is left as it is (it becomes zero by its mean)."""
    return np.where(std > 1e-12, std, 1.0)


def read_libsvm(path: Path, features: int | None = None, zero_based: str = "auto") -> tuple[sparse.csr_matrix, NDArray[np.float64], str]:
    """Read LIBSVM text: (n, d) CSR, labels, and a sentence that says which index base was found.

    ``zero_based``: "auto" (an index 0 anywhere means 0-based, else 1-based), "yes" or "no".
    Raises DataError with file and line for malformed pairs, NaN, repeated or out-of-range indices.
    """
    if not path.is_file():
        raise DataError(Issue(str(path), "no such file", hint="set data.path to the LIBSVM file", has_value=False))
    labels: list[float] = []
    indptr, indices, values = [0], [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split("#")[0].split()
            if not fields:
                continue
            try:
                labels.append(float(fields[0]))
                pairs = [(int(i), float(v)) for i, v in (f.split(":") for f in fields[1:])]
            except ValueError:
                raise DataError(Issue(f"{path}:{number}", "not `label index:value ...`", line.strip()[:60])) from None
            row = [i for i, _ in pairs]
            if len(set(row)) != len(row) or (row and min(row) < 0):
                raise DataError(Issue(f"{path}:{number}", "an index is repeated or negative", line.strip()[:60]))
            if not all(np.isfinite(v) for _, v in pairs):
                raise DataError(Issue(f"{path}:{number}", "NaN or infinite value", line.strip()[:60]))
            indices += row
            values += [v for _, v in pairs]
            indptr.append(len(indices))
    at = np.array(indices, dtype=np.int64)
    zero = zero_based == "yes" or (zero_based == "auto" and len(at) > 0 and at.min() == 0)
    if not zero:
        if len(at) and at.min() == 0:
            raise DataError(Issue(str(path), "holds index 0, so it is 0-based", zero_based, "data.zero_based=auto or yes"))
        at = at - 1
    d = int(at.max()) + 1 if len(at) else 0
    if features is not None and d > features:
        raise DataError(Issue(str(path), f"needs {d} features", features, "raise data.features, or check the index base"))
    matrix = sparse.csr_matrix((np.array(values), at, np.array(indptr)), shape=(len(labels), features or d))
    matrix.sort_indices()
    return matrix, np.array(labels), f"{path.name}: read as {'0' if zero else '1'}-based, {len(labels)} rows, {features or d} features"


def align(tables: dict[str, Table]) -> tuple[list[str], dict[str, NDArray[np.int64]], dict[str, dict[str, int]]]:
    """Order the common ids (sorted) and each party's rows in that order. Raises DataError when nothing is common.

    This needs all ids in one place: it is for simulations. Real parties use ``xutrain vertical align``.
    """
    common = sorted(set.intersection(*(set(t.ids) for t in tables.values())))
    report = {name: {"rows": len(t.ids), "matched": len(common), "dropped": len(t.ids) - len(common)} for name, t in tables.items()}
    if not common:
        raise DataError(Issue("data.files", "the parties have no id in common", report, "check data.id and how ids are written"))
    order = {}
    for name, table in tables.items():
        where = {i: at for at, i in enumerate(table.ids)}
        order[name] = np.array([where[i] for i in common], dtype=np.int64)
    return common, order, report
