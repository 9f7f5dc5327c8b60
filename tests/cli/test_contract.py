"""The command line's contract: JSON keys, exit codes, stdout and stderr, help without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xutrain.cli.app import run

QUICK = ["--config", "orq", "train.steps=4", "model.hidden=[16]"]


def _json(arguments: list[str], capfd: pytest.CaptureFixture[str], code: int = 0) -> Any:
    assert run(arguments) == code
    return json.loads(capfd.readouterr().out)


def test_result(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    result = _json(["quantize", *QUICK, "--out", str(runs), "--json"], capfd)
    assert list(result) == ["run", "recipe", "verb", "method", "codec", "seed", "status", "scale", "metrics", "bits", "wall_s"]
    assert set(result["bits"]) == {"up", "down", "per_worker_step"}
    assert {"train_loss", "test_loss", "test_accuracy"} <= set(result["metrics"])
    assert (result["verb"], result["recipe"], result["method"], result["codec"], result["status"], result["scale"]) == (
        "quantize",
        "orq",
        "sgd",
        "orq",
        "done",
        "cpu",
    )
    folder = Path(result["run"])
    for name in (
        "recipe.yaml",
        "source.yaml",
        "overrides.txt",
        "run.json",
        "state.json",
        "metrics.jsonl",
        "checkpoints/step-000004/model.safetensors",
    ):
        assert (folder / name).is_file(), name
    assert folder.relative_to(runs).parts[:2] == ("quantize", "orq")
    again = _json(["quantize", *QUICK, "--out", str(runs), "--json"], capfd)
    assert again == result


def test_seeds(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    result = _json(["quantize", *QUICK, "--out", str(runs), "--json", "--seeds", "0,1,2"], capfd)
    assert set(result) == {"runs", "mean", "std"}
    losses = [r["metrics"]["test_loss"] for r in result["runs"]]
    assert len(set(losses)) == 3
    mean = sum(losses) / 3
    assert result["mean"]["test_loss"] == pytest.approx(mean)
    assert result["std"]["test_loss"] == pytest.approx((sum((x - mean) ** 2 for x in losses) / 2) ** 0.5)
    assert len({Path(r["run"]).parent for r in result["runs"]}) == 1


def test_dry_run_writes_nothing_and_predicts(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    predicted = _json(["quantize", *QUICK, "--out", str(runs), "--json", "--dry-run"], capfd)
    assert not runs.exists()
    result = _json(["quantize", *QUICK, "--out", str(runs), "--json"], capfd)
    assert predicted["bits"] == result["bits"]
    assert predicted["run"] == result["run"]


def test_smoke_says_so(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    assert _json(["quantize", "--config", "orq", "--smoke", "--out", str(runs), "--json"], capfd)["scale"] == "smoke"


def test_stop_is_75_and_the_same_command_goes_on(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    arguments = ["quantize", *QUICK, "--out", str(runs), "--json"]
    folder = Path(_json([*arguments, "--dry-run"], capfd)["run"])
    folder.mkdir(parents=True)
    (folder / "STOP").write_text("2")
    stopped = _json(arguments, capfd, 75)
    assert stopped["status"] == "stopped"
    assert _json(arguments, capfd)["status"] == "done"


def test_divergence_is_4(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    over = ["optimizer.lr=1e5", "train.steps=60", "checkpoint.every=1"]
    result = _json(["quantize", "--config", "fp", *over, "--out", str(runs), "--json"], capfd, 4)
    assert result["status"] == "diverged"
    from xutrain.engine.checkpoint import damage

    newest = max((Path(result["run"]) / "checkpoints").glob("step-*"))
    assert damage(newest) == ""


def test_changed_metrics_are_noticed(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    arguments = ["quantize", *QUICK, "--out", str(runs), "--json"]
    metrics = Path(_json(arguments, capfd)["run"]) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"value": 0.', '"value": 1.', 1) + "\n")
    assert run(arguments) == 1
    assert "was changed after the run ended" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["result", "checksums gone", "no result"])
def test_a_changed_result_is_not_recalled(how: str, capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    arguments = ["quantize", *QUICK, "--out", str(runs), "--json"]
    file = Path(_json(arguments, capfd)["run"]) / "state.json"
    state = json.loads(file.read_text())
    state["result"]["metrics"]["test_accuracy"] = 0.99
    if how != "result":
        state = {k: v for k, v in state.items() if not k.endswith("_sha256")}
    if how == "no result":
        del state["result"]
    file.write_text(json.dumps(state))
    told = _json(arguments, capfd, 1)
    assert any("state.json" in e["where"] and "was changed after the run ended" in e["what"] for e in told["errors"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", "--foo"], "No such option: --foo"),
        (["quantise"], "quantize"),
        (["quantize", "--nproc", "x"], "--nproc: "),
        (["quantize", "--config", "orq", "--seeds", "²"], "--seeds: must be whole numbers"),
        (["quantize", "--config", "orq", "--seeds", "9" * 5000], "--seeds: must be whole numbers"),
        (["quantize", "--config", "orq", "verb=sparsify"], "verb: cannot be changed"),
        (["sweep"], "SUITE"),
        (["pipeline", "plan", "--foo"], "No such option: --foo"),
    ],
)
def test_wrong_flags_are_told_like_wrong_keys(arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--json"]) == 2
    out, told = capfd.readouterr()
    assert told.startswith("error: ") and "\nhint: " in told and says in told
    assert (value := json.loads(out))["exit_code"] == 2 and value["errors"]


def test_stdout_is_the_result_whatever_a_plugin_prints(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud_codec.py").write_text(
        "from xutrain.methods.codecs.onebit import OneBit\nfrom xutrain.registry import codec\nprint('imported')\n"
        "@codec('loud', summary='one bit that prints')\nclass Loud(OneBit):\n"
        "    def encode(self, vector, key=None):\n        print('encodes')\n        return super().encode(vector, key)\n"
    )
    (tmp_path / "torn_codec.py").write_text("def broken(:\n")
    (tmp_path / "hasty_codec.py").write_text("import math\nmath.sqrt(-1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("xutrain.registry._PLUGINS", {})  # gone after the test
    over = ["codec=loud", "plugins=[loud_codec]", "--out", str(runs), "--json"]
    assert run(["quantize", *QUICK, *over]) == 0
    out, told = capfd.readouterr()
    assert json.loads(out)["codec"] == "loud" and "imported" in told and "encodes" in told
    assert _json(["quantize", *QUICK, "plugins=[torn_codec]", "--json"], capfd, 2)["errors"][0]["what"].startswith("is not Python")
    said = _json(["quantize", *QUICK, "plugins=[hasty_codec]", "--json"], capfd, 2)["errors"][0]["what"]
    assert said.startswith("fails while it is imported: ValueError: ") and said.endswith("hasty_codec.py, line 2)")


def test_a_fault_of_the_smoke_section_is_told_as_one(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: quantize/orq\nverb: quantize\nsmoke: {train: {stepz: 3}, train.epochs: -1}\n")
    said = _json(["quantize", "--config", str(path), "--smoke", "--json"], capfd, 2)["errors"]
    assert [i["where"] for i in said] == ["smoke.train.epochs", "smoke.train.stepz"]
    assert run(["quantize", "--config", str(path), "--dry-run"]) == 0
    capfd.readouterr()
    said = _json(["quantize", "--config", str(path), "--smoke", "data.nothing=1", "--json"], capfd, 2)["errors"]
    assert "data.nothing" in [i["where"] for i in said]


def test_a_path_may_leave_out_yaml(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of the catalogue comes first where only a name is given."""
    (tmp_path / "mine.yaml").write_text("extends: quantize/orq\nverb: quantize\n")
    (tmp_path / "fp.yaml").write_text("extends: quantize/orq\nverb: quantize\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine", str(tmp_path / "mine"), "mine.yaml"):
        assert _json(["show", name, "--json"], capfd)["recipe"]["codec"]["name"] == "orq"
    assert _json(["show", "fp", "--json"], capfd)["recipe"]["codec"] in ("fp", {"name": "fp"})
    assert _json(["show", "./fp", "--json"], capfd)["recipe"]["codec"]["name"] == "orq"


def test_fresh_keeps_the_old_folder(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    arguments = ["quantize", *QUICK, "--out", str(runs), "--json"]
    folder = Path(_json(arguments, capfd)["run"])
    _json([*arguments, "--fresh"], capfd)
    assert len(list(folder.parent.glob("seed0*"))) == 2


def test_listings(capfd: pytest.CaptureFixture[str]) -> None:
    methods = _json(["ls", "methods", "--json"], capfd)
    assert all(list(m) == ["verb", "kind", "name", "paper", "summary"] for m in methods)
    assert {
        "orq",
        "bingrad_pb",
        "bingrad_b",
        "terngrad",
        "qsgd",
        "linear",
        "quantile",
        "onebit",
        "signsgd",
        "scaled_sign",
        "fp",
        "eden",
        "pb_orq",
    } <= {m["name"] for m in methods if m["kind"] == "codec"}
    recipes = _json(["ls", "recipes", "--json"], capfd)
    assert all(set(r) == {"verb", "name", "path", "scale", "summary"} for r in recipes)
    assert all(r["summary"] and r["scale"] in ("cpu", "paper") for r in recipes)


def test_cp_validate_diff(capfd: pytest.CaptureFixture[str], tmp_path: Path, runs: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert run(["cp", "orq", str(mine)]) == 0
    assert run(["cp", "orq", str(mine)]) == 2
    capfd.readouterr()
    assert run(["validate", str(mine)]) == 0
    capfd.readouterr()
    rows = _json(["diff", "orq", "orq3", "--json"], capfd)
    assert "codec.levels" in [r["key"] for r in rows]
    assert _json(["quantize", "--config", str(mine), "--smoke", "--out", str(runs), "--json"], capfd)["recipe"] == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["ls", "methods"],
        ["ls", "recipes"],
        ["show", "orq"],
        ["runs", "ls"],
        ["data", "ls"],
        ["--version"],
    ],
)
def test_no_torch_where_nothing_is_computed(arguments: list[str]) -> None:
    code = f"import sys; from xutrain.cli.app import run; c = run({arguments!r}); assert 'torch' not in sys.modules, 'torch'; sys.exit(c)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchrun_is_bit_equal(capfd: pytest.CaptureFixture[str], runs: Path) -> None:
    """The real launcher, two and four processes against one."""
    models = []
    for nproc in ("1", "2", "4"):
        result = _json(["quantize", *QUICK, "--out", str(runs / nproc), "--json", "--nproc", nproc], capfd)
        models.append((Path(result["run"]) / "checkpoints" / "step-000004" / "model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]


def test_python_surface(runs: Path) -> None:
    import torch

    import xutrain

    codec = xutrain.codec("orq", levels=9, bucket=2048)
    vector = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(vector, key=xutrain.key(seed=0, stream="round", step=3, worker=1))
    assert payload.data.dtype == torch.uint8 and payload.bits == 8 * payload.data.numel() == 8 * 2000 + 3 * 9 * 32
    assert codec.decode(payload).shape == vector.shape
    result = xutrain.run("quantize/orq", out=runs, train={"steps": 2}, model={"hidden": [8]})
    assert result["status"] == "done" and set(result["bits"]) == {"up", "down", "per_worker_step"}
    with pytest.raises(xutrain.RecipeError, match="levels"):
        xutrain.codec("orq", levels=4)


def test_dry_run_before_the_data_are_there(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XUTRAIN_DATA", str(tmp_path / "nothing"))
    arguments = ["quantize", "--config", "orq_c100_resnet56", "--json", "--out", str(tmp_path)]
    predicted = _json([*arguments, "--dry-run"], capfd)
    assert predicted["steps"] == 200 * (50_000 // 128)
    assert "xutrain data prepare cifar100" in predicted["forecast"]["data"]
    assert _json(arguments, capfd, 3)["status"] == "failed"
