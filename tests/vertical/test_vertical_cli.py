"""The verb as a user types it: forecast, result, artefacts, stop and resume, actions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xutrain.cli.app import run
from xutrain.engine.record import read_metrics
from xutrain.families import FAMILIES
from xutrain.recipe.load import load

SMALL = ["train.epochs=null", "train.steps=60", "eval.alone=false"]


def result(capsys, *arguments: str) -> tuple[int, dict]:
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_dry_run_equals_the_meter_and_the_run_leaves_models_and_ledgers(capsys, runs):
    command = ["vertical", "--config", "vfb2", *SMALL, "--out", str(runs)]
    _, predicted = result(capsys, *command, "--dry-run")
    code, found = result(capsys, *command)
    assert (code, found["status"]) == (0, "done")
    assert found["bits"] == predicted["bits"]
    artefacts = next(runs.rglob("artefacts"))
    models = [json.loads((artefacts / f"model.{p}.json").read_text()) for p in ("mean", "error", "worst")]
    assert [len(m["weights"]) for m in models] == [10, 10, 10]
    lines = [json.loads(line) for p in ("mean", "error", "worst") for line in (artefacts / f"ledger.{p}.jsonl").read_text().splitlines()]
    assert sum(line["bytes"] for line in lines) * 8 == found["bits"]["up"]
    assert {line["kind"] for line in lines if line["from"] == "worst"} == {"product", "pass"}
    assert all(line["masked"] for line in lines if line["from"] == "worst")


def test_a_stopped_run_goes_on_bit_equal(capsys, runs, tmp_path):
    command = ["vertical", "--config", "afsaga", *SMALL, "time.slow_party=worst", "time.delay=2"]
    _, whole = result(capsys, *command, "--out", str(tmp_path / "whole"))
    _, planned = result(capsys, *command, "--out", str(runs), "--dry-run")
    folder = Path(planned["run"])
    folder.mkdir(parents=True)
    (folder / "STOP").write_text("77")
    code, stopped = result(capsys, *command, "--out", str(runs))
    assert (code, stopped["status"]) == (75, "stopped")
    (folder / "STOP").unlink(missing_ok=True)
    code, found = result(capsys, *command, "--out", str(runs))
    assert code == 0
    assert found["metrics"] == whole["metrics"]
    assert found["bits"] == whole["bits"]


def test_a_stop_at_an_evaluation_does_not_lose_it(capsys, runs, tmp_path):
    command = ["vertical", "--config", "afsaga", *SMALL, "eval.every=1"]
    lines = []
    for out, stop in ((tmp_path / "whole", False), (runs, True)):
        _, planned = result(capsys, *command, "--out", str(out), "--dry-run")
        folder = Path(planned["run"])
        if stop:
            folder.mkdir(parents=True)
            (folder / "STOP").write_text("77")
            assert result(capsys, *command, "--out", str(out))[0] == 75
            (folder / "STOP").unlink(missing_ok=True)
        assert result(capsys, *command, "--out", str(out))[0] == 0
        lines.append([(line["step"], line["name"], line["value"]) for line in read_metrics(folder)])
    assert lines[0] == lines[1]


def test_every_recipe_is_valid_also_with_its_smoke_overrides():
    from xutrain.recipe import catalog

    names = [path.stem for path in (catalog.find("afsgd", "vertical")[0].parent).glob("*.yaml")]
    assert len(names) >= 23
    for name in names:
        for smoke in (False, True):
            assert load(name, "vertical", smoke=smoke).recipe.participants >= 1
    assert FAMILIES["vertical"].built


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["labels=[nobody]"], "must name parties"),
        (["labels=[mean,mean]"], "names a party twice"),
        (["method=fd_svrg"], "lock step only"),
        (["train.budget=total", "train.mode=sync"], "do not wait"),
        (["time.slow_party=nobody"], "is no party"),
        (["loss=ridge"], "labels of breast_cancer are of the kind binary"),
        (["data.parties=31"], "some would hold none"),
        (["train.lr=1e9"], "error"),
    ],
)
def test_faults_are_named(capsys, runs, overrides, message):
    code = run(["vertical", "--config", "afsgd", *overrides, "--out", str(runs), "--dry-run"])
    assert code in (2, 3)
    assert message in capsys.readouterr().err


def test_divergence_has_its_own_exit_code(capsys, runs):
    assert run(["vertical", "--config", "ridge", "train.lr=50", "train.epochs=3", "--out", str(runs)]) == 4


def test_audit_of_a_recipe(capsys):
    code, found = result(capsys, "vertical", "audit", "--config", "afsgd", "--attack", "trees")
    assert code == 0
    assert [row[1] for row in found["rows"]] == ["accepted", "accepted", "REFUSED", "REFUSED"]


def test_real_parties_are_told_what_is_missing(capsys, tmp_path):
    pytest.importorskip("grpc")
    assert run(["vertical", "train", "--config", "afsgd"]) == 2
    assert "--simulate" in capsys.readouterr().err
    assert run(["vertical", "train", "--config", "fd_svrg", "--simulate", "--out", str(tmp_path)]) == 2
    assert "method=vfb2" in capsys.readouterr().err


def test_all_parties_as_processes_of_this_machine(capsys, tmp_path):
    pytest.importorskip("grpc")
    pytest.importorskip("cryptography")
    words = [
        "--simulate",
        "--config",
        "vfb2",
        "labels=[error]",
        "train.epochs=2",
        "eval.every_epochs=null",
        "network.patience_s=200",
        "--out",
        str(tmp_path),
    ]
    code, found = result(capsys, "vertical", "train", *words)
    assert (code, found["status"]) == (0, "done")
    assert found["metrics"]["train_auc"] > found["metrics"]["auc_alone_error"]
    models = [json.loads((tmp_path / p / f"model.{p}.json").read_text()) for p in ("mean", "error", "worst")]
    assert len({m["job"] for m in models}) == len({m["rows"] for m in models}) == 1
    line = json.loads((tmp_path / "worst" / "ledger.worst.jsonl").read_text().splitlines()[0])
    assert (line["from"], line["to"]) == ("worst", "error")
