"""Feature-partitioned tables: what the parties of a vertical experiment hold, and how their files are read.

Row i is the same entity at every party. Dense blocks are float64 arrays, sparse ones CSR. No torch here: a party's process starts fast.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections.abc import Sequence
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
        some = any(sparse.issparse(p.train) for p in self.parties)  # then all of it is sparse
        stack, as_matrix = (sparse.hstack, sparse.csr_matrix) if some else (np.hstack, np.ascontiguousarray)
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
    """True for test rows: a hash of the id decides, so every party splits alike without talking. Shape (n,).

    Raises DataError where no row is left for training.
    """
    limit = int(fraction * 2**32)
    test = np.array(
        [int.from_bytes(hashlib.blake2b(f"{salt}|{i}".encode(), digest_size=4).digest(), "little") < limit for i in ids], dtype=bool
    )
    if len(test) and test.all():
        raise DataError(Issue("data.test_fraction", f"leaves no row for training of {len(test)}", fraction, "lower it"))
    return test


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
    rows: list[list[str]] = []
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text)
            header = [name.strip() for name in next(reader, [])]
            at_id = _id_column(path, header, id_column)
            seen: dict[str, int] = {}
            for row in reader:
                line = reader.line_num
                if len(row) != len(header):
                    raise DataError(Issue(f"{path}:{line}", f"{len(row)} cells, the header has {len(header)}", row[:3]))
                row[at_id] = row[at_id].strip()
                if not row[at_id]:
                    raise DataError(Issue(f"{path}:{line}", "empty id", row[:3]))
                if row[at_id] in seen:
                    raise DataError(
                        Issue(f"{path}:{line}", f"duplicate id, first seen in line {seen[row[at_id]]}", row[at_id], "one row per entity")
                    )
                seen[row[at_id]] = line
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as reason:
        raise DataError(Issue(str(path), f"is no CSV in UTF-8, after line {line}: {reason}", has_value=False)) from None
    cells = {name: [row[at] for row in rows] for at, name in enumerate(header)}
    ids = cells.pop(id_column)
    return Table(path, ids, cells, cells.pop(label, None) if label else None)


def _id_column(path: Path, header: list[str], name: str) -> int:
    """Where the id column is. Raises DataError where it is missing or a name is there twice."""
    if name not in header:
        raise DataError(Issue(str(path), "no such id column", name, f"columns: {', '.join(header[:20])}"))
    if twice := [column for at, column in enumerate(header) if column in header[:at]]:
        raise DataError(Issue(f"{path}:1", "a column name is there twice", twice[0]))
    return header.index(name)


def label_values(table: Table, task: str, label: str) -> NDArray:
    """The label column as numbers; classes are whole numbers from 0. Raises DataError naming file and row."""
    assert table.label is not None
    values = np.array([_number(cell, table.path, at, label) for at, cell in enumerate(table.label)])
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        what = "missing label" if np.isnan(values[at]) else "the label is infinite"
        raise DataError(Issue(f"{table.path}:{at + 2}", what, table.label[at], "drop rows without a label"))
    if task == "classes" and ((values < 0) | (values != np.floor(values))).any():
        at = int(np.flatnonzero((values < 0) | (values != np.floor(values)))[0])
        raise DataError(Issue(f"{table.path}:{at + 2}", "classes must be whole numbers from 0", table.label[at], "number them first"))
    if task == "binary":
        return binary_labels(values, f"{table.path}: column {label}")
    return values.astype(np.int64) if task == "classes" else values


def _number(cell: str, path: Path, at: int, column: str) -> float:
    number = _parsed(cell)
    if number is None:
        raise DataError(Issue(f"{path}:{at + 2}", f"column {column} is not a number", cell))
    return number


MISSING = frozenset({"", "na", "nan", "null", "?"})


def _parsed(cell: str) -> float | None:
    """A cell as a number, NaN for an empty one, None for text."""
    text = cell.strip().lower()
    if text in MISSING:
        return float("nan")
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def fit_preprocessing(
    columns: dict[str, list[str]], missing: str, rows: NDArray[np.int64], path: Path, lines: Sequence[int]
) -> dict[str, Any]:
    """Learn one-hot levels, means and scales on ``rows`` (the training rows); kept in the party's model file.

    ``missing``: "error" names the first empty cell; "mean" puts the training mean of numbers, and a level of its own for text.
    ``lines``: which row of the file each row is, for the message of an error.
    Raises DataError: empty cells, infinite or enormous values, a column of numbers in which a few cells are text.
    """
    steps: dict[str, Any] = {"missing": missing, "columns": {}}
    for name, cells in columns.items():
        parsed = [_parsed(cell) for cell in cells]
        _no_gaps(name, cells, parsed, missing, path, lines)
        text = [at for at, number in enumerate(parsed) if number is None]
        if text and 10 * len(text) < sum(number is not None and number == number for number in parsed):
            what = f"column {name} holds numbers, but text in {len(text)} of {len(cells)} cells"
            hint = "clean the file; empty, NA, NaN, null and ? mean a missing value"
            raise DataError(Issue(f"{path}:{lines[text[0]] + 2}", what, cells[text[0]], hint))
        if text:
            levels = sorted({cells[i].strip() or "missing" for i in rows})
            hot = np.array([[cells[i].strip() or "missing"] for i in rows]) == np.array(levels)
            steps["columns"][name] = {"levels": levels, "mean": hot.mean(axis=0).tolist(), "scale": _scale(hot.std(axis=0)).tolist()}
            continue
        numbers = _finite(name, parsed, path, lines)[rows]
        seen = numbers[~np.isnan(numbers)]
        with np.errstate(over="ignore"):
            mean, spread = (float(seen.mean()), float(seen.std())) if len(seen) else (0.0, 0.0)
        if len(seen) and seen.min() == seen.max():  # a mean of equal numbers is off by a rounding error
            mean, spread = float(seen[0]), 0.0
        if not np.isfinite(spread):
            raise DataError(Issue(str(path), f"the values of column {name} are too large to standardise", float(np.abs(seen).max())))
        steps["columns"][name] = {"mean": [mean], "scale": _scale(np.array([spread])).tolist()}
    return steps


def apply_preprocessing(
    columns: dict[str, list[str]], steps: dict[str, Any], path: Path, lines: Sequence[int]
) -> tuple[NDArray[np.float64], list[str]]:
    """Standardised dense block and its column names; unseen levels are zeros. Raises DataError for other columns, or cells like those
    that ``fit_preprocessing`` refuses."""
    if list(columns) != list(steps["columns"]):
        missing = [c for c in steps["columns"] if c not in columns]
        extra = [c for c in columns if c not in steps["columns"]]
        raise DataError(
            Issue(
                str(path),
                "columns differ from those of the model",
                {"missing": missing, "extra": extra},
                "use the same file layout as in training",
            )
        )
    parts, names = [np.zeros((len(lines), 0))], []
    for name, step in steps["columns"].items():
        cells = columns[name]
        parsed = [_parsed(cell) for cell in cells]
        _no_gaps(name, cells, parsed, steps["missing"], path, lines)
        if "levels" in step:
            raw = (np.array([[c.strip() or "missing"] for c in cells]) == np.array(step["levels"])).astype(np.float64)
            names += [f"{name}={level}" for level in step["levels"]]
        else:
            numbers = _finite(name, parsed, path, lines)
            raw = np.where(np.isnan(numbers), step["mean"][0], numbers)[:, None]
            names.append(name)
        parts.append((raw - np.array(step["mean"])) / np.array(step["scale"]))
    return np.ascontiguousarray(np.hstack(parts)), names


def _no_gaps(name: str, cells: list[str], parsed: list[float | None], missing: str, path: Path, lines: Sequence[int]) -> None:
    gaps = [at for at, number in enumerate(parsed) if number is not None and number != number]
    if gaps and missing == "error":
        what = f"empty or NaN cell in column {name} ({len(gaps)} in all)"
        raise DataError(Issue(f"{path}:{lines[gaps[0]] + 2}", what, cells[gaps[0]], "clean the file or set data.missing=mean"))


def _finite(name: str, parsed: list[float | None], path: Path, lines: Sequence[int]) -> NDArray[np.float64]:
    """A column of numbers, NaN where a cell is empty."""
    for at, number in enumerate(parsed):
        if number is None or abs(number) == float("inf"):
            what = f"column {name} was numeric in training and now holds text" if number is None else f"column {name} is infinite here"
            raise DataError(Issue(f"{path}:{lines[at] + 2}", what, has_value=False, hint="clean the file"))
    return np.array(parsed, dtype=np.float64)


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
    with path.open(encoding="utf-8", errors="replace") as lines:
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
            if not all(np.isfinite(v) for v in (labels[-1], *(v for _, v in pairs))):
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
