"""Statlog German credit: 1,000 applicants; what a bank, a credit bureau and a registry know of them. No torch here."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from pydantic import Field

from xutrain.data import store
from xutrain.data.archive import collect, damaged
from xutrain.data.tabular import Table, VerticalData
from xutrain.data.vertical_sets import joined
from xutrain.errors import DataError, Issue
from xutrain.registry import Named, dataset

FILE = "germancredit.csv"
LABEL, ID = "default", "applicant_id"
ROWS, COLUMNS = 1000, 21
PARTIES: dict[str, list[str]] = {
    "bank": [
        "status_of_existing_checking_account",
        "savings_account_and_bonds",
        "credit_amount",
        "duration_in_month",
        "purpose",
        "installment_rate_in_percentage_of_disposable_income",
    ],
    "bureau": ["credit_history", "other_debtors_or_guarantors", "other_installment_plans", "number_of_existing_credits_at_this_bank"],
    "registry": [
        "present_employment_since",
        "personal_status_and_sex",
        "present_residence_since",
        "property",
        "age_in_years",
        "housing",
        "job",
        "number_of_people_being_liable_to_provide_maintenance_for",
        "telephone",
        "foreign_worker",
    ],
}


def read(name: str, path: Path) -> store.Content:
    """The CSV as it is, after a look at its shape. Raises DataError where it is not there or not the expected table."""
    found = collect(path, lambda base: base == FILE)
    if FILE not in found:
        raise DataError(Issue(str(path), f"no {FILE} in here", has_value=False, hint="a CSV with a header and the column creditability"))
    _cells(found[FILE], str(path))
    return {FILE: found[FILE]}


def tables() -> dict[str, Table]:
    """One table per party, with ids; the bank's also with the label (1 = bad). Raises DataError where the set is not prepared."""
    store.recorded("german_credit")
    path = store.data_root() / "german_credit" / FILE
    if not path.is_file():
        raise store.missing("german_credit", path)
    cells = _cells(path.read_bytes(), str(path))
    ids = [f"A{row:04d}" for row in range(1, ROWS + 1)]
    label = ["1" if cell == "bad" else "0" for cell in cells["creditability"]]
    return {
        party: Table(path, ids, {c: cells[c] for c in columns}, label if party == "bank" else None) for party, columns in PARTIES.items()
    }


def _cells(data: bytes, where: str) -> dict[str, list[str]]:
    rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    wanted = {c for columns in PARTIES.values() for c in columns} | {"creditability"}
    if len(rows) != ROWS + 1 or not wanted <= set(rows[0]) or any(len(r) != COLUMNS for r in rows):
        raise damaged(where, f"expected {ROWS} rows of {COLUMNS} columns, creditability among them")
    return {name: [row[at] for row in rows[1:]] for at, name in enumerate(rows[0])}


@dataset(
    "german_credit",
    verbs=("vertical",),
    summary="1000 x 20 real loan applications; bank, bureau, registry (xutrain data prepare german_credit)",
)
class GermanCredit:
    """y = +1 for a bad loan. The bank holds the labels and, with ``intercept``, a column of ones."""

    class Options(Named):
        test_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Share of applicants kept for testing, by a hash of the id.")
        intercept: bool = Field(True, description="Give the bank a column of ones (regularised like any other).")

        def party_names(self) -> list[str]:
            return list(PARTIES)

    @staticmethod
    def build(options: GermanCredit.Options, seed: int = 0) -> VerticalData:
        return joined("german_credit", tables(), LABEL, "binary", "error", options.intercept, options.test_fraction)
