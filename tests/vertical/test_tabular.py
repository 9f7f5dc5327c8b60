"""Reading tables: every fault is a named error with file and row; 1-based LIBSVM is read rightly."""

from __future__ import annotations

import numpy as np
import pytest

from xutrain import registry
from xutrain.data.party_file import load_party, load_scoring
from xutrain.data.tabular import binary_labels, read_csv, read_libsvm, split_columns, split_rows
from xutrain.errors import DataError


def build(name, **options):
    cls = registry.load("dataset", name, verb="vertical")
    return cls.build(cls.Options(name=name, **options), 0)


@pytest.fixture
def two(tmp_path):
    (tmp_path / "a.csv").write_text("id,x,city,label\n1,0.5,Bonn,1\n2,1.5,Ulm,0\n3,2.5,Bonn,0\n4,1,Ulm,1\n")
    (tmp_path / "b.csv").write_text("id,v,w\n4,1,2\n2,3,1\n9,9,9\n1,5,0\n")
    return {"a": str(tmp_path / "a.csv"), "b": str(tmp_path / "b.csv")}


def test_party_files_join_on_ids_and_code_locally(two):
    data = build("party_files", files=two, id="id", label="label")
    assert data.label_holder == "a"
    assert data.y.tolist() == [1.0, -1.0, 1.0]  # ids 1, 2, 4
    assert data.parties[0].columns == ["x", "city=Bonn", "city=Ulm", "intercept"]
    assert np.abs(data.parties[1].train.mean(axis=0)).max() < 1e-15
    assert data.parties[1].train[:, 0].argmax() == 0
    assert "b: 4 rows, 3 matched, 1 dropped" in data.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,v\n1,2\n1,3\n", r"b.csv:3: duplicate id, first seen in line 2"),
        ("id,v\n1,2\n2\n", r"b.csv:3: 1 cells"),
        ("id,v\n1,2\n,3\n", r"b.csv:3: empty id"),
        ("key,v\n1,2\n", "no such id column"),
        ("id,v\n77,2\n", "no id in common"),
        ("id,v\n1,2\n2,\n4,1\n", r"b.csv:3: empty or NaN cell in column v"),
        ("id,v\n1,2\n2,nan\n4,1\n", r"b.csv:3: empty or NaN cell"),
        ("id,label\n1,0\n2,0\n4,1\n", "other labels for the same entity"),
        ("id,v,v\n1,2,3\n2,3,4\n4,1,5\n", r"b.csv:1: a column name is there twice"),
        ("id,v\n1,2\n 1 ,3\n", r"b.csv:3: duplicate id"),
        ("id,v\n1,2\n2,-nan\n4,1\n", r"b.csv:3: empty or NaN cell"),
        ("id,v\n1,2\n2,inf\n4,1\n", r"b.csv:3: column v is infinite"),
        ("id,v\n1,2\n2,1e308\n4,-1e308\n", r"column v are too large to standardise"),
        ("id\n1\n2\n4\n", r"b.csv: holds no feature columns"),
        ("id,v\n1,2\n2,caf\xe9\n", r"b.csv: is no CSV in UTF-8"),
        ("id,v\n1,2\n2," + "9" * 140_000 + "\n", r"b.csv: is no CSV in UTF-8, after line 2: field larger"),
    ],
)
def test_faults_of_a_csv_name_the_file_and_the_row(two, tmp_path, text, message):
    (tmp_path / "b.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=message):
        build("party_files", files=two, id="id", label="label")


@pytest.mark.parametrize(
    ("cell", "message"), [("3", "0/1 or -1/\\+1"), ("yes", "a.csv:3: column label is not a number"), ("", "a.csv:3: missing label")]
)
def test_other_labels_are_refused(two, tmp_path, cell, message):
    (tmp_path / "a.csv").write_text(f"id,x,label\n1,0.5,1\n2,1.5,{cell}\n4,1,1\n")
    with pytest.raises(DataError, match=message):
        build("party_files", files=two, id="id", label="label")


@pytest.mark.parametrize("cell", ["5x", "N/A", "1_000", "3\0"])
def test_a_few_cells_of_text_do_not_turn_numbers_into_levels(tmp_path, cell):
    (tmp_path / "a.csv").write_text("id,x,city,label\n" + "".join(f"{i},{i},{'AB'[i % 2]},{i % 2}\n" for i in range(1, 21)))
    (tmp_path / "b.csv").write_text("id,v\n" + "".join(f"{i},{cell if i == 7 else i}\n" for i in range(1, 21)))
    with pytest.raises(DataError, match=r"b.csv:8: column v holds numbers, but text in 1 of 20 cells"):
        build("party_files", files={p: str(tmp_path / f"{p}.csv") for p in "ab"}, id="id", label="label")


def test_a_party_may_hold_nothing_but_labels(two, tmp_path):
    (tmp_path / "a.csv").write_text("id,label\n1,0\n2,1\n4,1\n")
    data = build("party_files", files=two, id="id", label="label")
    assert data.parties[0].columns == ["intercept"]
    with pytest.raises(DataError, match="no feature columns"):
        build("party_files", files=two, id="id", label="label", intercept=False)


def test_a_file_to_be_scored_is_held_to_the_rules_of_training(two, tmp_path):
    options = registry.load("dataset", "party_files").Options(name="party_files", files=two, id="id", label="label")
    mine = load_party(options, "b", tmp_path / "b.csv")
    model = {"columns": mine.block.columns, "preprocessing": mine.block.preprocessing}
    assert np.array_equal(load_scoring(options, "b", tmp_path / "b.csv", model).block.test, mine.block.train)
    for cell, message in (("", "empty or NaN"), ("inf", "infinite"), ("x", "now holds text")):
        (tmp_path / "new.csv").write_text(f"id,v,w\n8,1,1\n7,{cell},2\n")
        with pytest.raises(DataError, match=rf"new.csv:3: .*{message}"):
            load_scoring(options, "b", tmp_path / "new.csv", model)


def test_missing_numbers_become_the_training_mean_when_asked(two, tmp_path):
    (tmp_path / "b.csv").write_text("id,v\n1,2\n2,\n4,4\n")
    data = build("party_files", files=two, id="id", label="label", missing="mean")
    assert data.parties[1].train[1, 0] == pytest.approx(0.0)


def test_labels_of_both_kinds():
    assert binary_labels(np.array([0, 1]), "x").tolist() == [-1.0, 1.0]
    assert binary_labels(np.array([-1.0, 1.0]), "x").tolist() == [-1.0, 1.0]
    with pytest.raises(DataError):
        binary_labels(np.array([1, 2]), "x")


def test_libsvm_bases(tmp_path):
    one, zero = tmp_path / "one.txt", tmp_path / "zero.txt"
    one.write_text("+1 1:2 3:4 # note\n-1 2:1\n")
    zero.write_text("+1 0:2 2:4\n-1 1:1\n")
    (x, y, said), (x0, _, said0) = read_libsvm(one), read_libsvm(zero)
    assert x.toarray().tolist() == [[2, 0, 4], [0, 1, 0]] == x0.toarray().tolist()  # the last feature is there
    assert y.tolist() == [1, -1]
    assert "1-based" in said
    assert "0-based" in said0
    with pytest.raises(DataError, match="0-based"):
        read_libsvm(zero, zero_based="no")
    with pytest.raises(DataError, match="needs 3 features"):
        read_libsvm(one, features=2)


@pytest.mark.parametrize("line", ["+1 1:x", "+1 1:nan", "one 1:2", "+1 2:1 2:3", "+1 -1:2"])
def test_libsvm_faults_name_the_line(tmp_path, line):
    file = tmp_path / "f.txt"
    file.write_text(f"+1 1:1\n{line}\n")
    with pytest.raises(DataError, match=r"f.txt:2"):
        read_libsvm(file)


def test_libsvm_set_is_sparse_and_split(tmp_path):
    (tmp_path / "f.txt").write_text("".join(f"{(-1) ** i} {1 + i % 5}:1 6:{i}\n" for i in range(40)))
    data = build("libsvm", path=str(tmp_path / "f.txt"), parties=4, test_fraction=0.25)
    assert [p.train.shape[1] for p in data.parties] == [2, 2, 1, 1]
    assert data.n + len(data.y_test) == 40
    with pytest.raises(DataError, match="some would hold none"):
        build("libsvm", path=str(tmp_path / "f.txt"), parties=7)
    with pytest.raises(DataError, match="no such file"):
        build("libsvm", path=str(tmp_path / "absent.txt"))


def test_official_split():
    assert [len(r) for r in split_columns(92, 8)] == [12, 12, 12, 12, 11, 11, 11, 11]


def test_rows_are_split_by_id_everywhere_alike():
    ids = [f"c{i}" for i in range(2000)]
    out = split_rows(ids, 0.2)
    assert 330 < out.sum() < 470
    assert (split_rows(ids[::-1], 0.2)[::-1] == out).all()


@pytest.mark.parametrize("shape", ["ucicreditcard", "rcv1_binary", "e2006_tfidf", "news20"])
def test_generated_tables_say_synthetic(shape):
    data = build("synthetic_table", shape=shape, rows=200, features=100, parties=4)
    assert data.synthetic
    assert data.name.endswith("-like")
    assert data.pooled().parties[0].train.shape == (200, 100)


def test_read_csv_names_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_csv(tmp_path / "none.csv", "id")


def test_credit_data_is_the_reference_problem():
    from xutrain.data import german_credit
    from xutrain.methods.vertical.central import optimum
    from xutrain.methods.vertical.losses import Logistic

    try:
        german_credit.tables()
    except DataError:
        pytest.skip("german_credit is not prepared")
    data = build("german_credit")
    assert optimum(data.pooled().parties[0].train, data.y, Logistic(), 1e-2)[1] == pytest.approx(0.4652087992740089, abs=1e-12)


@pytest.mark.parametrize(
    ("cell", "message"), [("1.5", "whole numbers from 0"), ("-1", "whole numbers from 0"), ("inf", "a.csv:3: .*infinite")]
)
def test_classes_are_whole_numbers(two, tmp_path, cell, message):
    (tmp_path / "a.csv").write_text(f"id,x,label\n1,0.5,0\n2,1.5,{cell}\n4,1,1\n")
    with pytest.raises(DataError, match=message):
        build("party_files", files=two, id="id", label="label", task="classes")


def test_libsvm_labels_are_finite(tmp_path):
    (tmp_path / "f.txt").write_text("1 1:1\nnan 1:2\n")
    with pytest.raises(DataError, match=r"f.txt:2"):
        read_libsvm(tmp_path / "f.txt")


@pytest.mark.parametrize("swapped", [False, True])
def test_training_and_test_file_have_one_base(tmp_path, swapped):
    """An index 0 in one of the two files says that both count from 0."""
    (tmp_path / "zero.txt").write_text("1 0:1 2:5\n-1 1:2\n")
    (tmp_path / "plain.txt").write_text("1 1:3 2:7\n-1 2:4\n")
    first, second = ("plain.txt", "zero.txt") if swapped else ("zero.txt", "plain.txt")
    data = build("libsvm", path=str(tmp_path / first), test_path=str(tmp_path / second), parties=1, dense=True)
    known = {"zero.txt": [[1, 0, 5], [0, 2, 0]], "plain.txt": [[0, 3, 7], [0, 0, 4]]}
    assert data.parties[0].train.tolist() == known[first]
    assert data.parties[0].test.tolist() == known[second]
    assert all("0-based" in note for note in data.notes)


def test_dense_and_sparse_parties_are_pooled(two, tmp_path):
    (tmp_path / "b.svm").write_text("0 1:5\n0 2:3\n0 1:1 3:2\n")
    (tmp_path / "b.svm.ids").write_text("1\n2\n4\n")
    for files in ({"a": two["a"], "b": str(tmp_path / "b.svm")}, {"b": str(tmp_path / "b.svm"), "a": two["a"]}):
        data = build("party_files", files=files, id="id", label="label")
        pooled = data.pooled().parties[0].train
        each = [np.asarray(p.train.todense()) if hasattr(p.train, "todense") else p.train for p in data.parties]
        assert np.asarray(pooled.todense()).tolist() == np.hstack(each).tolist()


@pytest.mark.parametrize("cell", ["123456789.123", "1e-30", "0.1"])
def test_a_constant_column_becomes_zero(tmp_path, cell):
    """The mean of equal large numbers is off by a rounding error, which must not be scaled up to one."""
    (tmp_path / "a.csv").write_text("id,x,v,label\n" + "".join(f"r{i},{cell},{i},{i % 2}\n" for i in range(1000)))
    data = build("party_files", files={"a": str(tmp_path / "a.csv")}, id="id", label="label", test_fraction=0.3)
    assert data.parties[0].columns[0] == "x"
    assert not data.parties[0].train[:, 0].any()
    assert not data.parties[0].test[:, 0].any()


def test_a_test_fraction_that_leaves_no_row_is_refused():
    with pytest.raises(DataError, match=r"data\.test_fraction: leaves no row for training"):
        build("breast_cancer", test_fraction=0.9999999)
