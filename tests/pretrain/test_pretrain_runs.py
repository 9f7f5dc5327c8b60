"""Whole runs: equal for any number of processes, resumed in mid-round without a trace, counted as forecast, refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xutrain.engine.checkpoint import Checkpoints
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.errors import DataError, Diverged, RecipeError, Stopped
from xutrain.loops import data_parallel
from xutrain.recipe.load import from_dict
from xutrain.registry import entries

ALL = [e.name for e in entries("method", "pretrain") if e.module.startswith("xutrain.methods.pretrain")]
Case = tuple[str, dict[str, Any]]


def recipe(method: str = "dsm", **changes: Any) -> Any:
    mapping: dict[str, Any] = {
        "data": {"name": "text", "context": 8, "val_windows": 16},
        "model": {"name": "gpt2", "layers": 1, "heads": 2, "width": 8},
        "workers": 4,
        "train": {"steps": 7, "batch_size": 2, "clip_norm": 1.0},
        "optimizer": {"name": "lion" if method == "lion" else "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2, "floor": 0.05},
        "eval": {"batch_size": 4},
        "method": {"name": method} if method in ("adamw", "lion") else {"name": method, "local_steps": 3},
    }
    return from_dict("pretrain", mapping, overrides=[f"{key}={value}" for key, value in changes.items()])


def train(folder: str, method: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One run: the saved model, its state, the meter and the metrics."""
    value = recipe(method, **changes)
    ctx = Context.open(value.seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    record = Record(Path(folder), ctx.meter, is_main=ctx.is_main)
    try:
        metrics = data_parallel.run(value, ctx, record)
    finally:
        record.close()
    saved = Checkpoints(record.folder, value.checkpoint, ctx).latest()
    assert saved is not None
    return {"x": saved.shared["method"]["x"], "metrics": metrics, "meter": ctx.meter.state(), "lines": list(record.read()), "saved": saved}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def _processes(folder: str, cases: list[Case]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in train(f"{folder}/{i}", method, changes).items() if k in ("x", "metrics", "meter")}
        for i, (method, changes) in enumerate(cases)
    ]


CASES: list[Case] = [
    *((name, {}) for name in ALL),
    ("dsm", {"method.shards": 4, "method.downlink": "sign"}),
    ("dsm", {"method.shards": 3}),
    ("dsm", {"method.sign": "random3", "method.bound": 8.0, "method.shards": 2, "method.downlink": "sign"}),
    ("dsm", {"method.sign": "random2"}),
    ("dsm", {"method.sign": "random2", "method.shards": 3}),
    ("slowmo", {"method.clip": 0.5, "method.clip_where": "after", "method.shards": 2}),
    ("slowmo", {"method.shards": 4, "codec": "{name: scaled_sign, bucket: 64}", "method.error_feedback": True}),
    ("dsm", {"codec": "{name: orq, levels: 5, bucket: 128}", "exchange.mode": "alltoall"}),
    ("adamw", {"codec": "{name: scaled_sign, bucket: 64}", "method.error_feedback": True}),
    ("dsm", {"optimizer.name": "torch", "optimizer.torch_class": "NAdam", "train.accumulate": 2}),
    ("local_adamw", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.lr": 0.1}),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case in one process."""
    return _processes(str(tmp_path_factory.mktemp("alone")), CASES)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_not_change_a_run(
    forked: Callable[..., list[Any]], tmp_path: Path, alone: list[dict[str, Any]], processes: int
) -> None:
    chosen = list(zip(CASES, alone, strict=True))[:: 3 if processes == 2 else 1]
    for rank, results in enumerate(forked(_processes, processes, str(tmp_path), [case for case, _ in chosen])):
        for (case, one), other in zip(chosen, results, strict=True):
            for key in ("x", "meter", "metrics"):
                assert equal(one[key], other[key]), (rank, case, key)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_forecast_is_what_the_meter_counts(alone: list[dict[str, Any]], number: int) -> None:
    method, changes = CASES[number]
    planned = data_parallel.forecast(recipe(method, **changes))
    counted = alone[number]["meter"]
    assert (planned.up, planned.down) == (sum(p[0] for p in counted.values()), sum(p[1] for p in counted.values()))


@pytest.mark.parametrize(
    "case",
    [
        ("dsm", {}),
        ("dsm", {"method.shards": 3, "method.downlink": "sign", "method.error_feedback": True, "codec": "scaled_sign"}),
        ("slowmo", {"optimizer.name": "torch", "optimizer.torch_class": "Adagrad"}),
        ("global_adamw", {"optimizer.name": "lion"}),
        ("diloco", {"optimizer.name": "sgd", "optimizer.momentum": 0.9}),
        ("adamw", {"method.error_feedback": True, "codec": "scaled_sign"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [4])
def test_resumed_in_the_middle_of_a_round(tmp_path: Path, case: Case, at: int) -> None:
    method, changes = case
    straight = train(str(tmp_path / "straight"), method, changes)
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "STOP").write_text(str(at))
    with pytest.raises(Stopped):
        train(str(folder), method, changes)
    (folder / "STOP").unlink()
    resumed = train(str(folder), method, changes)
    for key in ("x", "metrics", "meter"):
        assert equal(straight[key], resumed[key]), key
    for a, b in zip(straight["lines"], resumed["lines"], strict=True):
        assert {k: v for k, v in a.items() if k != "wall_s"} == {k: v for k, v in b.items() if k != "wall_s"}
    assert equal(straight["saved"].worker(1), resumed["saved"].worker(1))


def _own_weights(folder: str) -> dict[str, Any]:
    """As if every rank had drawn its own weights: the streams of initialisation differ by rank."""
    value = recipe()
    ctx = Context.open(value.seed)
    original = Context.seed_torch

    def by_rank(self: Context, stream: str, step: int = 0, worker: int = 0) -> None:
        original(self, f"{stream} of rank {self.rank}" if stream == "init" else stream, step, worker)

    Context.seed_torch = by_rank  # type: ignore[method-assign]
    try:
        job = data_parallel.build(value, ctx)
    finally:
        Context.seed_torch = original  # type: ignore[method-assign]
    return {"drawn": job.replica.read(), "x": job.method.deploy()["x"], "points": [job.method.point(w) for w in job.workers.hosted]}


def test_ranks_with_other_initial_weights_start_from_those_of_rank_0(forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks = forked(_own_weights, 2, str(tmp_path))
    assert not torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])
    for rank in ranks:
        assert torch.equal(rank["x"], ranks[0]["drawn"])
        assert all(torch.equal(p, ranks[0]["drawn"]) for p in rank["points"])


@pytest.mark.parametrize("method", ["dsm", "slowmo", "global_adamw"])
def test_sharded_is_unsharded(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"model.width": 10, "train.steps": 6}
    whole = train(str(tmp_path / "whole"), method, changes)
    assert whole["x"].numel() % 4  # the last shard is shorter
    for shards in (1, 2, 3, 4) if method == "dsm" else (3, 4):
        cut = train(str(tmp_path / f"{shards}"), method, {**changes, "method.shards": shards})
        assert torch.equal(whole["x"], cut["x"]) and whole["metrics"] == cut["metrics"]
        ratios = [[line["value"] for line in run["lines"] if line["name"] == "step_ratio"] for run in (whole, cut)]
        assert ratios[0] and np.allclose(*ratios, rtol=1e-5)


@pytest.mark.parametrize("sign", ["random2", "random3"])
def test_random_signs_of_shards_are_those_of_the_whole(tmp_path: Path, sign: str) -> None:
    """Owners of parts of a tensor agree on its largest value; what they tell each other is counted."""
    changes: dict[str, Any] = {"model.width": 10, "train.steps": 6, "method.sign": sign}
    whole = train(str(tmp_path / "whole"), "dsm", changes)
    for shards, downlink in ((3, "fp32"), (4, "sign")):
        cut = train(str(tmp_path / f"{shards}"), "dsm", {**changes, "method.shards": shards, "method.downlink": downlink})
        assert torch.equal(whole["x"], cut["x"])
        assert cut["meter"]["bounds"][1] > 0 and "bounds" not in whole["meter"]


def test_signs_that_travel_back_lose_nothing_and_cost_a_bit(tmp_path: Path) -> None:
    plain = train(str(tmp_path / "plain"), "dsm", {"train.steps": 6, "method.shards": 4})
    signs = train(str(tmp_path / "signs"), "dsm", {"train.steps": 6, "method.shards": 4, "method.downlink": "sign"})
    assert torch.equal(plain["x"], signs["x"])
    elements = plain["x"].numel()
    assert plain["meter"]["model"] == [0, 2 * 4 * 32 * elements]
    assert signs["meter"]["model"][1] <= 2 * 4 * (elements + 4 * 16)  # a header byte and at most a byte of padding a shard
    assert "model zeros" not in signs["meter"]


def test_coordinates_without_a_sign_stay_where_they_are(tmp_path: Path) -> None:
    """A vocabulary larger than the data's, SGD without decay: unused rows of the untrained kind have no displacement."""
    changes = {"train.steps": 6, "method.beta1": 0.0, "optimizer.name": "sgd", "optimizer.weight_decay": 0.0, "optimizer.lr": 1e-30}
    plain = train(str(tmp_path / "plain"), "dsm", changes)
    signs = train(str(tmp_path / "signs"), "dsm", {**changes, "method.shards": 3, "method.downlink": "sign"})
    assert torch.equal(plain["x"], signs["x"])
    assert signs["meter"]["model zeros"][1] > 0


def test_ring_counts_and_one_exchange_per_round(tmp_path: Path) -> None:
    """2 x 32 d bits a worker and round in ring terms, 1 / tau of data parallel."""
    local = train(str(tmp_path / "local"), "dsm", {"train.steps": 6, "exchange.reduction": "ring"})
    every = train(str(tmp_path / "every"), "adamw", {"train.steps": 6, "exchange.reduction": "ring"})
    elements = local["x"].numel()
    assert local["meter"]["displacement"] == [2 * 4 * 32 * elements, 2 * 2 * 3 * 32 * elements]
    assert [3 * v for v in local["meter"]["displacement"]] == every["meter"]["gradient"]


def _ring(folder: str) -> list[Tensor]:
    cases: list[Case] = [("dsm", {"exchange.reduction": "ring"}), ("dsm", {"exchange.reduction": "ring", "method.shards": 4})]
    cases.append(("dsm", {"exchange.reduction": "ring", "method.shards": 3, "method.downlink": "sign"}))
    return [result["x"] for result in _processes(folder, cases)]


def test_ring_and_reduce_scatter_are_close_to_exact_and_equal_on_all_ranks(forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    exact = train(str(tmp_path / "exact"), "local_adamw", {})["x"]
    ranks = forked(_ring, 2, str(tmp_path / "ring"))
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0], other, strict=True))
    assert exact.shape == ranks[0][0].shape
    for x in ranks[0][1:]:  # a displacement close to zero may take another sign; nearly all do not
        assert float((x != ranks[0][0]).float().mean()) < 0.02


def test_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    whole = train(str(tmp_path / "whole"), "local_adamw", {"train.batch_size": 4})
    parts = train(str(tmp_path / "parts"), "local_adamw", {"train.batch_size": 4, "train.accumulate": 4})
    torch.testing.assert_close(whole["x"], parts["x"], rtol=0, atol=2e-4)
    assert abs(whole["metrics"]["val_loss"] - parts["metrics"]["val_loss"]) < 1e-3


def test_bf16_keeps_a_float32_global_state(tmp_path: Path) -> None:
    found = train(str(tmp_path), "dsm", {"train.precision": "bf16"})
    assert found["x"].dtype == torch.float32
    assert found["saved"].shared["method"]["memory"]["m"].dtype == torch.float32
    assert 3 < found["metrics"]["val_loss"] < 7


def test_what_is_measured_and_saved_is_the_global_model(tmp_path: Path) -> None:
    """A checkpoint in mid-round holds x_{t,0} of the last round, under all names of the tied weight."""
    found = train(str(tmp_path), "dsm", {"checkpoint.every": 5, "checkpoint.keep": 5})
    folder = tmp_path / "checkpoints" / "step-000005"
    from safetensors.torch import load_file

    from xutrain.engine.checkpoint import Saved

    model, saved = load_file(folder / "model.safetensors"), Saved(folder, torch.device("cpu"))
    assert torch.equal(model["transformer.wte.weight"], saved.shared["method"]["x"][: 256 * 8].view(256, 8))
    assert torch.equal(model["transformer.wte.weight"], model["lm_head.weight"])
    assert not torch.equal(saved.worker(0)["point"], saved.shared["method"]["x"])
    assert set(found["metrics"]) >= {"val_loss", "perplexity"}
    assert np.isclose(np.exp(found["metrics"]["val_loss"]), found["metrics"]["perplexity"])


def test_training_learns(tmp_path: Path) -> None:
    found = train(str(tmp_path), "dsm", {"train.steps": 48, "method.eta": 2.0, "method.beta1": 0.3, "method.beta2": 0.5, "eval.every": 24})
    losses = [line["value"] for line in found["lines"] if line["name"] == "val_loss"]
    assert len(losses) == 2 and losses[-1] < losses[0] < 5.5


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train(str(tmp_path), "local_adamw", {"optimizer.name": "sgd", "optimizer.lr": 1e6, "train.clip_norm": "null", "train.steps": 30})


@pytest.mark.parametrize(
    ("method", "changes", "where"),
    [
        ("dsm", {"method.local_steps": 8}, "method.local_steps"),
        ("dsm", {"method.last_round": "refuse"}, "train.steps"),
        ("dsm", {"eval.every": 4}, "eval.every"),
        ("dsm", {"method.shards": 5}, "method.shards"),
        ("dsm", {"method.downlink": "sign"}, "method.downlink"),
        ("slowmo", {"method.clip": 1.0, "method.clip_by": "l2", "method.shards": 2}, "method.clip_by"),
        ("dsm", {"method.sign": "random2", "method.bound": -1.0}, "method.bound"),
        ("adamw", {"optimizer.name": "sgd"}, "optimizer.name"),
        ("dsm", {"optimizer.torch_class": "Adagrad"}, "optimizer.torch_class"),
        ("dsm", {"optimizer.betas": "[0.9, 1.0]"}, "optimizer.betas"),
        ("dsm", {"optimizer.name": "sgd", "optimizer.betas": "[0.9, 0.99]"}, "optimizer.betas"),
        ("dsm", {"optimizer.momentum": 0.9}, "optimizer.momentum"),
        ("dsm", {"optimizer.name": "sgd", "optimizer.nesterov": True}, "optimizer.nesterov"),
        ("dsm", {"optimizer.torch_options": "{amsgrad: true}"}, "optimizer.torch_options"),
        ("dsm", {"method.error_feedback": True, "codec": "scaled_sign", "exchange.mode": "alltoall"}, "exchange.mode"),
        ("adamw", {"method.error_feedback": True, "codec": "{name: random_k, ratio: 8, rescale: true}"}, "codec"),
        ("dsm", {"train.accumulate": 3, "train.batch_size": 4}, "train.accumulate"),
        ("dsm", {"method.beta3": 0.1}, "method.beta3"),
    ],
)
def test_recipes_that_cannot_be_right(method: str, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as found:
        recipe(method, **changes)
    assert any(issue.where.startswith(where) and issue.hint for issue in found.value.issues), found.value


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model.vocabulary": 100}, "model.vocabulary"),
        ({"model.context": 4}, "model.context"),
        ({"model.width": 9}, "model.width"),
        ({"data.context": 1_000_000}, "data.context"),
        ({"optimizer.name": "torch", "optimizer.torch_class": "Adagrid"}, "optimizer.torch_class"),
        ({"optimizer.name": "torch", "optimizer.torch_class": "SparseAdam"}, "optimizer.torch_class"),
        ({"optimizer.name": "torch", "optimizer.torch_class": "Rprop"}, "optimizer.weight_decay"),
        (
            {"optimizer.name": "torch", "optimizer.torch_class": "Adagrad", "optimizer.torch_options": "{nonsense: 1}"},
            "optimizer.torch_options",
        ),
        (
            {"optimizer.name": "torch", "optimizer.torch_class": "NAdam", "optimizer.torch_options": "{weight_decay: 0.5}"},
            "optimizer.weight_decay=0.5",
        ),
        ({"train.steps": "null", "train.epochs": 0.0003, "method.last_round": "refuse", "method.local_steps": 5}, "method.local_steps"),
        ({"method.shards": 2, "codec": "{name: random_block, ratio: 4.0}"}, "method.shards"),
    ],
)
def test_refused_before_training(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as found:
        data_parallel.forecast(recipe(**changes))
    assert found.value.exit_code == 2 and where in str(found.value)


def _tokens(folder: Path, name: str, values: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    values.tofile(folder / name)


def test_token_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    good = (np.arange(4000) % 200).astype(np.uint16)
    _tokens(tmp_path, "train.bin", good)
    _tokens(tmp_path, "val.bin", good)
    changes = {"data": f"{{name: tokens, path: '{tmp_path}', vocabulary: 200, context: 8, val_windows: 16}}"}
    assert "val_loss" in train(str(tmp_path / "run"), "dsm", changes)["metrics"]

    def refused(*words: str) -> None:
        with pytest.raises(DataError) as found:
            data_parallel.forecast(recipe(**changes))
        assert found.value.exit_code == 3 and all(word in str(found.value) for word in words), found.value

    _tokens(tmp_path, "train.bin", good.astype(np.int32) + 70_000)  # another dtype: its upper halves are no tokens
    refused("beyond the vocabulary of 200")
    for dtype, word in ((np.int32, "4-byte integers"), (np.int64, "8-byte integers")):  # whose values would all be tokens
        _tokens(tmp_path, "train.bin", good.astype(dtype))
        refused(word, "uint16")
    with (tmp_path / "train.bin").open("wb") as file:
        np.save(file, good)
    refused("numpy with its header")
    (tmp_path / "train.bin").write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    refused("plain text")
    (tmp_path / "train.bin").write_bytes(good.tobytes()[:-1])
    refused("cut short")
    (tmp_path / "train.bin").write_bytes(b"")
    refused("cut short")
    (tmp_path / "train.bin").unlink()
    refused("no such token file")
    _tokens(tmp_path, "train.bin", good + 1)
    refused("beyond the vocabulary of 200", "data.vocabulary")
