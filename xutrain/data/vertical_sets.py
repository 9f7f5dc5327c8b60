"""Data sets of the vertical verb: bundled ones, files of real parties, and generated ones that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from xutrain.data.party_table import columns_of, needs_columns, read_table, with_intercept
from xutrain.data.tabular import (
    Matrix,
    PartyBlock,
    Table,
    VerticalData,
    align,
    apply_preprocessing,
    binary_labels,
    fit_preprocessing,
    label_values,
    read_libsvm,
    split_columns,
    split_rows,
)
from xutrain.errors import DataError, Issue
from xutrain.registry import Named, dataset


class SplitOptions(Named):
    """Options shared by the sets that are cut into contiguous blocks."""

    parties: int = Field(3, ge=1, description="Number of parties; contiguous blocks of columns, the first ones get one more.")
    test_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Share of rows kept for testing, chosen by a hash of the row number.")

    def party_names(self) -> list[str]:
        return [f"party{p}" for p in range(self.parties)]


def _blocks(x: Matrix, columns: list[str], test: NDArray[np.bool_], names: list[str], ranges: list[range]) -> list[PartyBlock]:
    def cut(rows: NDArray[np.bool_], cols: range) -> Matrix:
        part = x[np.flatnonzero(rows)][:, cols.start : cols.stop]
        return sparse.csr_matrix(part) if sparse.issparse(part) else np.ascontiguousarray(part)

    return [PartyBlock(name, columns[r.start : r.stop], cut(~test, r), cut(test, r)) for name, r in zip(names, ranges, strict=True)]


def _standardised(x: NDArray[np.float64], test: NDArray[np.bool_]) -> NDArray[np.float64]:
    std = x[~test].std(axis=0)
    return (x - x[~test].mean(axis=0)) / np.where(std > 1e-12, std, 1.0)


@dataset("breast_cancer", verbs=("vertical",), summary="569 x 30 real, bundled with scikit-learn; parties mean, error, worst")
class BreastCancer:
    """Wisconsin diagnostic breast cancer; y = +1 for benign. Three parties: the mean, error and worst measurements."""

    class Options(SplitOptions):
        normalise_rows: bool = Field(False, description="Scale each standardised row to norm 1.")

        def party_names(self) -> list[str]:
            return ["mean", "error", "worst"] if self.parties == 3 else super().party_names()

    @staticmethod
    def build(options: BreastCancer.Options, seed: int = 0) -> VerticalData:
        from sklearn.datasets import load_breast_cancer

        raw = load_breast_cancer()
        test = split_rows([str(i) for i in range(569)], options.test_fraction)
        x = _standardised(raw.data, test)
        if options.normalise_rows:
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        y = np.where(raw.target == 1, 1.0, -1.0)
        names = options.party_names()
        blocks = _blocks(x, [str(c) for c in raw.feature_names], test, names, split_columns(30, len(names)))
        return VerticalData("breast_cancer", blocks, y[~test], y[test], "binary", names[0])


@dataset("digit_quadrants", verbs=("vertical",), summary="1797 x 64 real, bundled with scikit-learn; four image quadrants, 10 classes")
class DigitQuadrants:
    """8 x 8 digits; each of four parties sees one quadrant of every image."""

    class Options(SplitOptions):
        parties: Literal[4] = Field(4, description="Four quadrants.")

        def party_names(self) -> list[str]:
            return ["top_left", "top_right", "bottom_left", "bottom_right"]

    @staticmethod
    def build(options: DigitQuadrants.Options, seed: int = 0) -> VerticalData:
        from sklearn.datasets import load_digits

        raw = load_digits()
        test = split_rows([str(i) for i in range(len(raw.target))], options.test_fraction)
        grid = (raw.images / 16.0).reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 64)
        columns = [f"pixel{4 * (q // 2) + r},{4 * (q % 2) + c}" for q in range(4) for r in range(4) for c in range(4)]
        blocks = _blocks(grid, columns, test, options.party_names(), split_columns(64, 4))
        y = raw.target.astype(np.int64)
        return VerticalData("digit_quadrants", blocks, y[~test], y[test], "classes", "top_left", classes=10)


@dataset("diabetes", verbs=("vertical",), summary="442 x 10 real, bundled with scikit-learn; regression")
class Diabetes:
    """Disease progression after one year, standardised target; for the ridge loss."""

    class Options(SplitOptions):
        pass

    @staticmethod
    def build(options: Diabetes.Options, seed: int = 0) -> VerticalData:
        from sklearn.datasets import load_diabetes

        raw = load_diabetes()
        test = split_rows([str(i) for i in range(442)], options.test_fraction)
        x = _standardised(raw.data, test)
        y = (raw.target - raw.target[~test].mean()) / raw.target[~test].std()
        blocks = _blocks(x, list(raw.feature_names), test, options.party_names(), split_columns(10, options.parties))
        return VerticalData("diabetes", blocks, y[~test], y[test], "regression", "party0")


@dataset("party_files", verbs=("vertical",), summary="one CSV or LIBSVM file per party with ids, joined on common ids")
class PartyFiles:
    """The parties' own files, CSV with an id column or LIBSVM (.svm) with a file of ids beside it, brought together on one machine (a
    simulation); a CSV is one-hot coded and standardised by its own party, LIBSVM values are taken as they are."""

    class Options(Named):
        files: dict[str, str] = Field(min_length=1, description="Party name: path of its CSV, or of its LIBSVM file (.svm).")
        id: str = Field("id", description="The id column, in every CSV.")
        label: str = Field("label", description="The label column, in the CSV of each label holder.")
        classes: int | None = Field(None, ge=2, description="Task classes, real parties: how many there are; labels are 0 to classes - 1.")
        task: Literal["binary", "regression", "classes"] = Field("binary", description="Kind of label.")
        missing: Literal["error", "mean"] = Field("error", description="What to do with empty cells.")
        intercept: bool = Field(True, description="Give the label holder a column of ones (regularised like any other).")
        test_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Share of entities kept for testing, by a hash of the id.")

        def party_names(self) -> list[str]:
            return list(self.files)

    @staticmethod
    def build(options: PartyFiles.Options, seed: int = 0) -> VerticalData:
        tables = {name: read_table(Path(path), options) for name, path in options.files.items()}
        return joined("party_files", tables, options.label, options.task, options.missing, options.intercept, options.test_fraction)


def joined(name: str, tables: dict[str, Table], label: str, task: str, missing: str, intercept: bool, test_fraction: float) -> VerticalData:
    """Tables of several parties on their common ids, each one-hot coded and standardised by its own party. Raises DataError."""
    holders = [party for party, table in tables.items() if table.label is not None]
    if not holders:
        raise DataError(Issue("data.label", "the column is in no party's file", label, f"parties: {', '.join(tables)}"))
    ids, order, report = align(tables)
    test = split_rows(ids, test_fraction)
    held = {party: label_values(tables[party], task, label)[order[party]] for party in holders}
    y = held[holders[0]]
    for party in holders[1:]:
        if (held[party] != y).any():
            at = int(np.flatnonzero(held[party] != y)[0])
            raise DataError(Issue("data.label", f"{holders[0]} and {party} have other labels for the same entity", ids[at]))
    blocks = []
    for party, table in tables.items():
        lines = [int(i) for i in order[party]]
        x: Matrix
        if table.matrix is not None:
            steps, x, names = table.form, sparse.csr_matrix(table.matrix[lines]), columns_of(table)
        else:
            columns = {c: [cells[i] for i in lines] for c, cells in table.columns.items()}
            steps = fit_preprocessing(columns, missing, np.flatnonzero(~test), table.path, lines)
            x, names = apply_preprocessing(columns, steps, table.path, lines)
        if intercept and party == holders[0]:
            x, names = with_intercept(x), [*names, "intercept"]
        needs_columns(table.path, names)
        blocks += _blocks(x, names, test, [party], [range(len(names))])
        blocks[-1].preprocessing = steps
    classes = int(y.max()) + 1 if task == "classes" else 0
    notes = [f"{party}: {r['rows']} rows, {r['matched']} matched, {r['dropped']} dropped" for party, r in report.items()]
    notes += [table.note for table in tables.values() if table.note]
    return VerticalData(name, blocks, y[~test], y[test], task, holders[0], classes, notes=notes)


@dataset("libsvm", verbs=("vertical",), summary="LIBSVM text files, cut into contiguous blocks of columns")
class LibSVM:
    """One LIBSVM file (and maybe a test file) cut into the official contiguous blocks; 1-based indices are read rightly."""

    class Options(SplitOptions):
        path: str = Field(description="Training file.")
        test_path: str | None = Field(None, description="Test file; without it test_fraction of the rows.")
        task: Literal["binary", "regression", "classes"] = Field("binary", description="Kind of label.")
        features: int | None = Field(None, ge=1, description="Number of features, if the files do not show all of them.")
        zero_based: Literal["auto", "yes", "no"] = Field(
            "auto", description="Base of the indices in both files (quoted words); auto: an index 0 in either means 0."
        )
        dense: bool = Field(False, description="Keep dense arrays (for few features).")
        standardise_target: bool = Field(False, description="Regression: subtract the training mean of y, divide by its deviation.")

    @staticmethod
    def build(options: LibSVM.Options, seed: int = 0) -> VerticalData:
        y: NDArray
        x, y, note = read_libsvm(Path(options.path), options.features, options.zero_based)
        notes = [note]
        if options.test_path:
            x2, y2, note2 = read_libsvm(Path(options.test_path), options.features, options.zero_based)
            if ("0-based" in note) != ("0-based" in note2):  # an index 0 in one of them says that both count from 0
                x, y, note = read_libsvm(Path(options.path), options.features, "yes")
                x2, y2, note2 = read_libsvm(Path(options.test_path), options.features, "yes")
                notes = [note]
            d = max(x.shape[1], x2.shape[1])
            x.resize(x.shape[0], d)
            x2.resize(x2.shape[0], d)
            test = np.repeat([False, True], [len(y), len(y2)])
            x, y = sparse.csr_matrix(sparse.vstack([x, x2])), np.concatenate([y, y2])
            notes.append(note2)
        else:
            test = split_rows([str(i) for i in range(len(y))], options.test_fraction)
        classes = 0
        if options.task == "binary":
            y = binary_labels(y, options.path)
        elif options.task == "classes":
            classes, y = len(np.unique(y)), np.unique(y, return_inverse=True)[1]
        elif options.standardise_target:
            y = (y - y[~test].mean()) / y[~test].std()
        names = options.party_names()
        matrix: Matrix = np.asarray(x.todense()) if options.dense else x
        blocks = _blocks(matrix, [f"f{j}" for j in range(x.shape[1])], test, names, split_columns(x.shape[1], options.parties))
        return VerticalData("libsvm", blocks, y[~test], y[test], options.task, names[0], classes, notes=notes)


#: rows, features, density, task, classes of the data sets of the paper's run scripts.
SHAPES: dict[str, tuple[int, int, float, str, int]] = {
    "ucicreditcard": (30_000, 90, 1.0, "binary", 0),
    "givemesomecredit": (120_269, 92, 1.0, "binary", 0),
    "rcv1_binary": (697_641, 47_236, 0.0016, "binary", 0),
    "news20_binary": (19_996, 1_355_191, 0.0003, "binary", 0),
    "url": (2_396_130, 3_231_961, 0.00004, "binary", 0),
    "webspam": (350_000, 16_609_143, 0.0002, "binary", 0),
    "e2006_tfidf": (19_395, 150_360, 0.008, "regression", 0),
    "e2006_log1p": (19_395, 4_272_227, 0.0014, "regression", 0),
    "year_msd": (515_345, 90, 1.0, "regression", 0),
    "news20": (19_928, 62_061, 0.0013, "classes", 20),
    "rcv1_multiclass": (534_135, 47_236, 0.0014, "classes", 53),
    "real_sim": (72_309, 20_958, 0.0025, "binary", 0),
}


@dataset("synthetic_table", verbs=("vertical",), summary="generated tables in the shape of the paper's data sets (synthetic)")
class SyntheticTable:
    """A linear model with noise. It has the shape of a named data set and nothing else of it: results are marked synthetic."""

    class Options(SplitOptions):
        shape: Literal[
            "ucicreditcard", "givemesomecredit", "rcv1_binary", "news20_binary", "url", "webspam",
            "e2006_tfidf", "e2006_log1p", "year_msd", "news20", "rcv1_multiclass", "real_sim",
        ] = Field("ucicreditcard", description="Whose rows, features, density and task to imitate.")  # fmt: skip
        rows: int | None = Field(None, ge=2, description="Fewer or more rows than the original.")
        features: int | None = Field(None, ge=1, description="Fewer or more features than the original.")
        noise: float = Field(1.0, ge=0.0, description="Deviation of the noise added to the true score.")

    @staticmethod
    def build(options: SyntheticTable.Options, seed: int = 0) -> VerticalData:
        rows, features, density, task, classes = SHAPES[options.shape]
        rows, features = options.rows or rows, options.features or features
        rng = np.random.Generator(np.random.Philox(seed))
        if density >= 1.0:
            x: Matrix = rng.standard_normal((rows, features))
        else:
            each = max(2, int(density * SHAPES[options.shape][1]))  # non-zeros a row, as in the original, however many columns are kept
            each = min(each, features)
            columns = rng.integers(0, features, size=(rows, each))
            values = np.abs(rng.standard_normal((rows, each))) / np.sqrt(each)
            x = sparse.csr_matrix((values.ravel(), columns.ravel(), np.arange(0, rows * each + 1, each)), shape=(rows, features))
            x.sum_duplicates()
        truth = rng.standard_normal((features, classes) if classes else features)
        score = np.asarray(x @ truth)
        score = score / score.std() * 2.0 + options.noise * rng.standard_normal(score.shape)
        y: NDArray = (
            score.argmax(axis=1)
            if classes
            else np.where(score > 0, 1.0, -1.0)
            if task == "binary"
            else (score - score.mean()) / score.std()
        )
        test = split_rows([str(i) for i in range(rows)], options.test_fraction)
        names = options.party_names()
        blocks = _blocks(x, [f"f{j}" for j in range(features)], test, names, split_columns(features, options.parties))
        return VerticalData(f"{options.shape}-like", blocks, y[~test], y[test], task, names[0], classes, synthetic=True)
