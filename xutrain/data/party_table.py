"""One party's file as a table, whatever its format: a CSV with an id column, or LIBSVM text with its ids in a file beside it.

``bank.svm`` (also .libsvm, .svmlight) is LIBSVM text: ``label index:value ...``. Its ids are in ``bank.svm.ids``, one a line, in the
same order. A party without labels writes 0 in front of every line. Values are taken as they are: nothing is coded or standardised,
for a sparse block would become dense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from xutrain.data.tabular import Table, label_values, read_csv, read_libsvm
from xutrain.errors import DataError, Issue

SPARSE = (".svm", ".libsvm", ".svmlight")


def is_libsvm(path: Path) -> bool:
    return path.suffix.lower() in SPARSE


def read_table(path: Path, options: Any, ids: Path | None = None, like: dict[str, Any] | None = None) -> Table:
    """Ids, columns and labels of a party's file.

    Args:
        options: the ``party_files`` section of the job. ids: the id file of a LIBSVM file, where it is not beside it.
        like: preprocessing of a model file, whose index base and number of features hold for a LIBSVM file to be scored.
    Raises:
        DataError: see ``read_csv`` and ``read_libsvm``; ids that are missing, empty, repeated, or not as many as the rows.
    """
    if not is_libsvm(path):
        if ids is not None:
            raise DataError(
                Issue("--ids", "is for LIBSVM files; a CSV has its id column", str(ids), f"LIBSVM files end in {', '.join(SPARSE)}")
            )
        return read_csv(path, options.id, options.label)
    base = "auto" if like is None else "yes" if like["zero_based"] else "no"
    matrix, labels, note = read_libsvm(path, like["features"] if like else None, base)
    found = read_ids(ids or path.with_name(path.name + ".ids"), len(labels), path)
    held = [repr(v) for v in labels.tolist()] if np.any(labels != 0) else None
    return Table(
        path, found, {}, held, matrix, {"format": "libsvm", "features": matrix.shape[1], "zero_based": "read as 0-based" in note}, note
    )


def read_ids(path: Path, rows: int, data: Path) -> list[str]:
    """The id file of a LIBSVM file: one id a line. Raises DataError naming file and line."""
    if not path.is_file():
        raise DataError(
            Issue(str(path), f"no such file: the ids of {data.name}, one a line", has_value=False, hint="write it, or give --ids FILE")
        )
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as reason:
        raise DataError(Issue(str(path), f"is no text in UTF-8: {reason}", has_value=False)) from None
    seen: dict[str, int] = {}
    for number, i in enumerate(found, 1):
        if not i:
            raise DataError(Issue(f"{path}:{number}", "empty id", has_value=False))
        if i in seen:
            raise DataError(Issue(f"{path}:{number}", f"duplicate id, first seen in line {seen[i]}", i, "one row per entity"))
        seen[i] = number
    if len(found) != rows:
        raise DataError(Issue(str(path), f"{len(found)} ids for the {rows} rows of {data.name}", has_value=False))
    return found


def columns_of(table: Table) -> list[str]:
    """Names of the features of a LIBSVM table, counted from 0 whatever the base of its file."""
    assert table.matrix is not None
    return [f"f{j}" for j in range(table.matrix.shape[1])]


def needs_columns(path: Path, names: list[str]) -> None:
    """Raises DataError for a party that has nothing to add to a sum."""
    if not names:
        raise DataError(Issue(str(path), "holds no feature columns", has_value=False, hint="every party needs at least one"))


def with_intercept(x: Any) -> Any:
    """A column of ones on the right, dense or CSR."""
    ones = np.ones((x.shape[0], 1))
    return sparse.csr_matrix(sparse.hstack([x, ones])) if sparse.issparse(x) else np.hstack([x, ones])


def labels_of(table: Table, options: Any) -> Any:
    """Labels as the task has them. Raises DataError: not numbers, other than 0/1 or -1/+1, classes outside 0..C-1."""
    y = label_values(table, options.task, options.label)
    if options.task == "classes" and options.classes is not None and (y.min() < 0 or y.max() >= options.classes):
        bad = int(y.max() if y.max() >= options.classes else y.min())
        raise DataError(Issue(f"{table.path}: column {options.label}", f"classes must be 0 to {options.classes - 1}", bad, "data.classes"))
    return y
