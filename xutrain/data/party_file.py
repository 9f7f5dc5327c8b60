"""One real party's file, read by that party alone: ids, columns, maybe labels; standardised on its training rows. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from xutrain.data.party_table import columns_of, labels_of, needs_columns, read_table, with_intercept
from xutrain.data.tabular import PartyBlock, Table, apply_preprocessing, fit_preprocessing, split_rows
from xutrain.errors import DataError, Issue


@dataclass
class PartyData:
    """What one party brings: its block, all ids in the agreed order, and labels if it holds them."""

    block: PartyBlock
    ids: list[str]
    y: NDArray | None
    y_test: NDArray | None
    test_ids: list[str]
    note: str = ""

    def order_hash(self, salt: str) -> str:
        """Salted hash of the row order; equal at all parties or nothing starts."""
        return hashlib.sha256("\n".join([salt, *self.ids]).encode()).hexdigest()


def load_party(
    options: Any, party: str, path: Path, rows: Path | None = None, *, id_file: Path | None = None, leader: str | None = None
) -> PartyData:
    """Read and prepare a training file.

    Args:
        options: the ``party_files`` section of the job. rows: the order file that ``xutrain vertical align`` wrote; without it the
            ids of all parties must be the same set, and are sorted. id_file: the ids of a LIBSVM file, where they are not beside it.
        leader: the label holder that has the intercept; by default any party with labels.
    Raises:
        DataError: see ``read_table``; an id of the order that the file does not hold.
    """
    table = read_table(path, options, id_file)
    ids, columns = in_order(table, rows)
    test = split_rows(ids, options.test_fraction)
    at = {i: line for line, i in enumerate(table.ids)}
    lines = [at[i] for i in ids]
    x: Any
    if table.matrix is not None:
        steps, x, names = table.form, table.matrix[lines], columns_of(table)
    else:
        steps = fit_preprocessing(columns, options.missing, np.flatnonzero(~test), path, lines)
        x, names = apply_preprocessing(columns, steps, path, lines)
    y = labels_of(table, options)[lines] if table.label is not None else None
    if options.intercept and y is not None and leader in (None, party):
        x, names = with_intercept(x), [*names, "intercept"]
    needs_columns(path, names)
    block = PartyBlock(party, names, _rows(x, ~test), _rows(x, test), steps)
    held = [i for i, out in zip(ids, test, strict=True) if out]
    return PartyData(block, ids, None if y is None else y[~test], None if y is None else y[test], held, table.note)


def _rows(x: Any, chosen: NDArray[np.bool_]) -> Any:
    part = x[np.flatnonzero(chosen)]
    return part if sparse.issparse(part) else np.ascontiguousarray(part)


def load_scoring(
    options: Any, party: str, path: Path, model: dict[str, Any], rows: Path | None = None, *, id_file: Path | None = None
) -> PartyData:
    """Read a file to be scored with the coding that the model file keeps. Raises DataError where its columns differ from the model's."""
    known = model["preprocessing"]
    sparse_model = known.get("format") == "libsvm"
    table = read_table(path, options, id_file, known if sparse_model else None)
    if sparse_model != (table.matrix is not None):
        raise DataError(
            Issue(str(path), f"the model was trained on a {'LIBSVM' if sparse_model else 'CSV'} file", path.suffix or path.name)
        )
    ids, columns = in_order(table, rows)
    at = {i: line for line, i in enumerate(table.ids)}
    lines = [at[i] for i in ids]
    x: Any
    if table.matrix is not None:
        x, names = table.matrix[lines], columns_of(table)
    else:
        x, names = apply_preprocessing(columns, known, path, lines)
    if model["columns"] == [*names, "intercept"]:
        x, names = with_intercept(x), [*names, "intercept"]
    if names != model["columns"]:
        raise DataError(
            Issue(str(path), "coded columns differ from those of the model", names[:10], f"the model has {len(model['columns'])} columns")
        )
    none = np.zeros(len(ids), dtype=bool)
    return PartyData(PartyBlock(party, names, _rows(x, none), _rows(x, ~none), known), ids, None, None, ids, table.note)


def in_order(table: Table, rows: Path | None) -> tuple[list[str], dict[str, list[str]]]:
    """Ids and columns in the agreed order."""
    at = {i: line for line, i in enumerate(table.ids)}
    ids = sorted(table.ids)
    if rows is not None:
        try:
            value = json.loads(rows.read_text(encoding="utf-8"))
            ids = [str(i) for i in value["ids"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(Issue("--rows", "is no order file of `xutrain vertical align`", str(rows))) from None
        unknown = [i for i in ids if i not in at]
        if unknown:
            raise DataError(Issue(str(rows), f"{len(unknown)} ids are not in {table.path}", unknown[0], "align again"))
    return ids, {name: [cells[at[i]] for i in ids] for name, cells in table.columns.items()}
