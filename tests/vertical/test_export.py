"""The merged model scores raw rows as the parties do together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xutrain.cli.app import run
from xutrain.data.party_file import load_party
from xutrain.data.vertical_sets import PartyFiles
from xutrain.loops.vertical_export import merged, read


@pytest.fixture
def models(tmp_path: Path) -> tuple[list[Path], float]:
    """Two parties' model files with random weights, and the joint score of the first row."""
    rng = np.random.default_rng(0)
    (tmp_path / "a.csv").write_text("id,x,city,label\n1,0.5,Bonn,1\n2,1.5,Ulm,0\n3,2.5,Bonn,0\n4,1,Ulm,1\n")
    (tmp_path / "b.csv").write_text("id,z\n1,3\n2,9\n3,4\n4,-1\n")
    files = {name: str(tmp_path / f"{name}.csv") for name in "ab"}
    options = PartyFiles.Options(name="party_files", files=files, id="id", label="label")
    paths, score = [], 0.0
    for name in "ab":
        data = load_party(options, name, Path(files[name]))
        w = rng.standard_normal(len(data.block.columns))
        score += float(data.block.train[0] @ w)
        model = {"party": name, "parties": ["a", "b"], "run": "run", "job": "j", "loss": "logistic", "weights": w.tolist()}
        paths.append(tmp_path / f"model.{name}.json")
        paths[-1].write_text(json.dumps({**model, "columns": data.block.columns, "preprocessing": data.block.preprocessing}))
    return paths, score


def test_merged_coefficients_score_raw_values(models, tmp_path):
    paths, score = models
    out = tmp_path / "merged.json"
    assert run(["vertical", "export", *map(str, paths), "--out", str(out)]) == 0
    value = json.loads(out.read_text())
    raw = {"x": 0.5, "city=Bonn": 1.0, "city=Ulm": 0.0, "z": 3.0}
    assert value["intercept"] + sum(c["coefficient"] * raw[c["column"]] for c in value["coefficients"]) == pytest.approx(score, abs=1e-12)


def test_every_party_must_give_its_file(models, tmp_path, capsys):
    paths, _ = models
    assert run(["vertical", "export", str(paths[0])]) == 2
    assert "the file of b is missing" in capsys.readouterr().err
    assert run(["vertical", "export", str(paths[0]), str(paths[0])]) == 2
    other = json.loads(paths[1].read_text())
    paths[1].write_text(json.dumps({**other, "job": "another"}))
    assert run(["vertical", "export", *map(str, paths)]) == 2
    assert "another run or job" in capsys.readouterr().err
    paths[1].write_text("no JSON")
    assert run(["vertical", "export", *map(str, paths)]) == 2


def test_a_partys_own_column_called_intercept_is_a_column(models, tmp_path):
    """Only the ones that were put beside the coded columns are the intercept."""
    paths, _ = models
    model = json.loads(paths[1].read_text())
    steps = {"missing": "error", "columns": {"intercept": {"mean": [3.75], "scale": [2.0]}}}
    paths[1].write_text(json.dumps({**model, "columns": ["intercept"], "weights": [4.0], "preprocessing": steps}))
    plain = merged([(path, read(path)) for path in paths])
    assert plain["coefficients"][-1] == {"column": "intercept", "party": "b", "coefficient": 2.0}
    steps["columns"] = {"z": steps["columns"]["intercept"]}
    paths[1].write_text(json.dumps({**model, "columns": ["z"], "weights": [4.0], "preprocessing": steps}))
    assert merged([(path, read(path)) for path in paths])["intercept"] == plain["intercept"]
