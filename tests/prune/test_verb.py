"""`xutrain prune` from recipe to run folder."""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import digest, save, tokens
from torch.utils.flop_counter import FlopCounterMode

from xutrain.data import windows
from xutrain.engine.rng import Key
from xutrain.errors import DataError, RecipeError
from xutrain.launch.plan import plan
from xutrain.launch.run import launch
from xutrain.loops import embedded_mixtral, pruning
from xutrain.methods.prune import cost
from xutrain.methods.prune.base import Routing
from xutrain.methods.prune.checkpoint import prune_checkpoint, weight_method
from xutrain.methods.prune.drop import _expert_method, drop_experts
from xutrain.methods.prune.measure import layer_errors, open_forward, perplexity, stored_bytes, window_losses
from xutrain.models.decoder import Decoder
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source
from xutrain.recipe.load import load

RECIPES = sorted(f.stem for f in (Path(__file__).parents[2] / "configs" / "prune").glob("*.yaml"))


def go(runs: Path, *overrides: str, config: str = "moe_pruner") -> dict[str, Any]:
    return launch(plan(load(config, "prune", overrides, smoke=True), out=runs, verbosity=-1))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One runs folder, so that the embedded model is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_smoke_run(shared: Path, name: str) -> None:
    result = go(shared, config=name)
    assert result["status"] == "done", result
    assert result["metrics"]["perplexity"] > 1 and result["scale"] == "smoke"


def test_run_folder_and_recall(shared: Path) -> None:
    first = go(shared, "method.gate=sqrt")
    metrics = first["metrics"]
    assert metrics["sparsity"] == pytest.approx(0.5) and 0 < metrics["local_error"] < 1 and 0 < metrics["model_sparsity"] < 0.5
    folder = Path(first["run"])
    assert {"experts.csv", "router_load.csv", "summary.md"} <= {f.name for f in (folder / "artefacts").iterdir()}
    assert "not smaller or faster" in (folder / "artefacts" / "summary.md").read_text()
    assert Source(folder / "pruned").entries and go(shared, "method.gate=sqrt").get("recalled")
    assert len(list((shared / "prune" / ".models").glob("*/config.json"))) == 1  # trained once


def test_magnitude_needs_no_data_and_random_is_worse(shared: Path) -> None:
    results = {m: go(shared, f"method.name={m}")["metrics"] for m in ("magnitude", "random", "wanda", "path", "sparsegpt")}
    assert all(results[m]["local_error"] < results["random"]["local_error"] for m in ("magnitude", "wanda", "path", "sparsegpt"))
    assert results["wanda"]["perplexity_dense"] == results["random"]["perplexity_dense"]


def test_outlier_model_is_the_same_function_and_wanda_does_not_mind(shared: Path) -> None:
    plain, twin = (go(shared, "method.name=wanda", f"model.embedded.outliers={o}")["metrics"] for o in ("false", "true"))
    assert twin["loss_dense"] == pytest.approx(plain["loss_dense"], abs=1e-5)
    assert twin["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_stop_and_resume_in_pruning_and_in_distillation(tmp_path: Path, shared: Path) -> None:
    whole = go(shared, config="distill")
    for at in (1, 4):  # inside the pruning; inside the distillation
        out = tmp_path / str(at)
        shutil.copytree(shared / "prune" / ".models", out / "prune" / ".models")
        job = plan(load("distill", "prune", (), smoke=True), out=out, verbosity=-1)
        job.folder.mkdir(parents=True)
        (job.folder / "STOP").write_text(str(at))
        assert launch(job)["exit_code"] == 75
        parts = go(out, config="distill")
        assert digest(Path(parts["run"]) / "distilled") == digest(Path(whole["run"]) / "distilled")
        assert parts["metrics"] == whole["metrics"]


def test_missing_files_are_named() -> None:
    with pytest.raises(DataError, match="no such text"):
        list(windows.documents(Path("nowhere.txt")))
    with pytest.raises(DataError, match="too few"):
        windows.draw(torch.arange(100), 50, 30, Key())
    with pytest.raises(DataError, match="less than one window"):
        windows.cut(torch.arange(10), 20)


def test_windows_of_files(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 5)
    assert windows.file_windows(text, windows.tokenizer(None), 12).shape == (4, 12)
    lines = tmp_path / "c4.jsonl"
    lines.write_text('{"text": "short"}\n' + '{"text": "' + "x" * 90 + '"}\n' + '{"text": "' + "y" * 90 + '"}\n')
    drawn = windows.file_samples(lines, windows.tokenizer(None), 2, 40, Key())
    assert drawn.shape == (2, 40) and sorted(set(drawn.flatten().tolist())) == [ord("x"), ord("y")]
    with pytest.raises(DataError, match="only 2 of 3 documents"):
        windows.file_samples(lines, windows.tokenizer(None), 3, 40, Key())
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        list(windows.documents(tmp_path / "bad.jsonl"))
    parts = windows.embedded()
    assert len(parts["train"]) > 300_000 and min(len(parts["val"]), len(parts["calibration"])) > 20_000


def test_streamed_losses_equal_the_model_in_memory(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense", dtype=torch.float32)
    model = Decoder(Architecture.read(tmp_path / "dense"))
    model.load(Source(tmp_path / "dense"))
    data = tokens(3, 20)
    with torch.no_grad():
        expected = [float(torch.nn.functional.cross_entropy(model(w[None])[0, :-1], w[1:])) for w in data]
    losses = window_losses(open_forward(tmp_path / "dense"), data)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert perplexity(losses) == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    same = open_forward(tmp_path / "dense")
    assert layer_errors(same, same, data) == [0.0] * 3
    assert stored_bytes(tmp_path / "dense")["zeros"] == 0


def test_balance_loss_is_one_when_even_and_n_when_collapsed() -> None:
    n, tokens_ = 4, 8
    even = Routing(torch.arange(8).remainder(4).view(8, 1), torch.ones(8, 1), torch.full((tokens_, n), 1 / n))
    collapsed = Routing(torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1), torch.eye(n)[0].expand(8, n))
    for r, value in ((even, 1.0), (collapsed, 4.0)):
        assert float(embedded_mixtral.balance_loss([(None, r.index, r.weight, r.prob)])) == pytest.approx(value)


def test_forecast_counts_the_published_sizes_without_weights() -> None:
    for name, parameters, gigabytes in (("mixtral_8x7b_half", 46.70e9, 93.4), ("mixtral_8x22b_half", 140.6e9, 281)):
        details = pruning.forecast(load(name, "prune").recipe).details
        assert details["parameters"] == pytest.approx(parameters, rel=1e-3)
        assert details["bytes_read"] / 1e9 == pytest.approx(gigabytes, rel=1e-2)
        assert details["peak_bytes"] < 40e9


def test_shape_counts_equal_the_files(tmp_path: Path) -> None:
    for kind in ("mixtral", "qwen2_moe", "deepseek_v2", "olmoe", "llama"):
        save(kind, tmp_path / kind)
        stored = sum(math.prod(e.shape) for e in Source(tmp_path / kind).entries.values())
        assert cost.Shape.of(Architecture.read(tmp_path / kind)).total == pytest.approx(stored, rel=0.01), kind


def test_peak_grows_with_what_a_method_needs() -> None:
    arch = pruning.shape_of(load("mixtral_8x7b_half", "prune").recipe)
    peaks = [
        cost.peak_bytes(arch, weight_method(m), 4096, 2048, "float32", 1, 2048, False)["total"] for m in ("magnitude", "path", "sparsegpt")
    ]
    assert peaks == sorted(peaks) and peaks[0] < 10e9


def test_forecast_of_expert_methods_and_of_measuring() -> None:
    """NAEE holds every expert of a layer; the error of the layers holds two more numbers for each hidden state."""
    arch = pruning.shape_of(load("mixtral_8x7b_half", "prune").recipe)
    naee, reap = (
        cost.peak_bytes(arch, _expert_method({"name": m, "keep": 6}), 4096, 2048, "float32", 1, 2048, False)["total"]
        for m in ("naee", "reap")
    )
    assert naee > 8 * arch.expert_parameters * 4 > reap
    plain, errors = (cost.evaluation_bytes(arch, 2048, "float32", 1, 2048, e) for e in (False, True))
    assert errors[1] - plain[1] >= 2 * 2048 * arch.hidden * 4 and plain[1] >= 2 * 2048 * arch.hidden * 4
    with pytest.raises(DataError, match="size is missing"):
        cost.Shape.of(Architecture.of({**arch.config, "num_attention_heads": "x"}))


def test_perplexity_of_a_loss_that_is_no_number_is_none() -> None:
    assert math.isnan(perplexity(torch.tensor([1.0, math.nan]))) and perplexity(torch.tensor([1e6])) == math.exp(700)


def test_compressed_lines_are_lines(tmp_path: Path) -> None:
    for name in ("c4.json.gz", "c4.jsonl.gz"):
        with gzip.open(tmp_path / name, "wt") as stream:
            stream.write('{"text": "one"}\n{"text": "two"}\n')
        assert list(windows.documents(tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize(
    "method",
    ["wanda", "path", {"name": "wanda", "all_tokens": True}, {"name": "path", "gate": "all_tokens"}, {"name": "naee", "keep": 6}],
    ids=str,
)
def test_operations_are_those_that_torch_counts(tmp_path: Path, method: Any) -> None:
    save("mixtral", tmp_path / "dense", num_hidden_layers=1, num_local_experts=8, intermediate_size=128)
    data, whole = tokens(8, 32), isinstance(method, dict) and method["name"] == "naee"
    with FlopCounterMode(display=False) as counted:
        if whole:
            drop_experts(tmp_path / "dense", tmp_path / "out", data, method=method)
        else:
            prune_checkpoint(tmp_path / "dense", tmp_path / "out", data, method=method)
    part = _expert_method(method) if whole else weight_method(method)
    said = cost.operations(Architecture.read(tmp_path / "dense"), part, data.numel(), 32, False)
    assert 0.8 < said / counted.get_total_flops() < 1.4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distill.source=nowhere.txt"], "no such text"),
        (["distill.length=400000"], "distill.length: the text has only"),
        (["distill.mode=layers", "distill.inputs=teacher", "distill.length=400000"], "too few"),
    ],
)
def test_a_text_that_distillation_cannot_use_is_found_before_the_pruning(shared: Path, overrides: list[str], words: str) -> None:
    result = go(shared, *overrides, config="distill")
    assert result["exit_code"] == 3 and words in " ".join(result["error"])
    assert not (Path(result["run"]) / "pruned").exists()


def test_a_window_longer_than_the_embedded_text_is_refused(tmp_path: Path) -> None:
    size = load("moe_pruner", "prune", ["model.embedded.length=400000"], smoke=True).recipe.model.embedded
    with pytest.raises(RecipeError, match=r"model\.embedded\.length"):
        embedded_mixtral.train(size, 0, lambda *args: None, lambda: False)
