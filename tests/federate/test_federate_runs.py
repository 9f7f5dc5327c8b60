"""Whole runs: equal for any number of processes, stopped and resumed without a trace, counted as forecast, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.errors import Diverged, RecipeError, Stopped
from xutrain.loops import federated
from xutrain.recipe.load import from_dict
from xutrain.registry import entries, load

#: methods that want a data set of sites or a net with norm layers: tests/federate/test_fedsm_*.py
ELSEWHERE = ("fedsm", "fedbn")
ALL = [e.name for e in entries("method", "federate") if e.module.startswith("xutrain.methods.federate") and e.name not in ELSEWHERE]


def recipe(method: str = "domo", **changes: Any) -> Any:
    mapping: dict[str, Any] = {
        "data": {"name": "digits", "subset": 240, "test_subset": 60},
        "model": {"name": "mlp", "hidden": [8]},
        "partition": {"name": "similarity", "s": 0.5},
        "clients": {"count": 4},
        "train": {"rounds": 3, "local_steps": 3, "batch_size": 8, "lr": 0.05},
        "method": {"name": method},
    }
    if load("method", method, verb="federate").validates:
        mapping["clients"]["val_fraction"] = 0.2
    return from_dict("federate", mapping, overrides=[f"{key}={value}" for key, value in changes.items()])


def train(folder: str, method: str, changes: dict[str, Any]) -> dict[str, Any]:
    return train_recipe(folder, recipe(method, **changes))


def train_recipe(folder: str, value: Any) -> dict[str, Any]:
    """One run; the server's model, the meter and the metrics."""
    ctx = Context.open(value.seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    record = Record(Path(folder), ctx.meter, is_main=ctx.is_main)
    metrics = federated.run(value, ctx, record)
    record.close()
    from xutrain.engine.checkpoint import Checkpoints

    saved = Checkpoints(record.folder, value.checkpoint, ctx).latest()
    assert saved is not None
    return {
        "model": saved.shared["server"]["model"],
        "metrics": metrics,
        "meter": ctx.meter.state(),
        "lines": list(record.read()),
        "saved": saved,
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _processes(folder: str, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    out = []
    for i, (method, changes) in enumerate(cases):
        result = train(f"{folder}/{i}", method, changes)
        out.append({k: result[k] for k in ("model", "metrics", "meter")})
    return out


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ALL),
    ("domo", {"clients.fraction": 0.5}),
    ("scaffold", {"clients.fraction": 0.5}),
    ("fedavg", {"codec": "{name: orq}", "train.rounds": 2}),
    ("domo", {"codec": "{name: top_k, ratio: 8}"}),
    ("scaffold", {"codec": "{name: random_block, ratio: 4}", "train.rounds": 2}),
    ("domo", {"model.name": "resnet_cifar", "model.depth": 8, "model.width": 4, "train.rounds": 2, "data.subset": 120}),
    (
        "fedavg",
        {
            "partition.name": "dirichlet",
            "partition.alpha": 0.5,
            "clients.steps": "own",
            "clients.weights": "samples",
            "train.local_steps": "null",
        },
    ),
]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_bits(tmp_path: Path, processes: int, forked: Any) -> None:  # T11
    alone = _processes(str(tmp_path / "1"), CASES)
    spread = forked(_processes, processes, str(tmp_path / f"{processes}"), CASES)
    for case, one, *others in zip(CASES, alone, *spread, strict=True):
        for other in others:
            assert equal(one, other), case


@pytest.mark.parametrize("case", [*((name, {}) for name in ALL), *CASES[len(ALL) :]], ids=str)
def test_stop_and_resume_leave_no_trace(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    method, changes = case
    whole = train(str(tmp_path / "whole"), method, changes)
    (tmp_path / "parts").mkdir()
    for at in (1, 2):
        (tmp_path / "parts" / "STOP").write_text(str(at))
        if recipe(method, **changes).train.rounds > at:
            with pytest.raises(Stopped, match=f"round {at}"):
                train(str(tmp_path / "parts"), method, changes)
    (tmp_path / "parts" / "STOP").unlink()
    resumed = train(str(tmp_path / "parts"), method, changes)
    for what in ("model", "metrics", "meter"):
        assert equal(whole[what], resumed[what]), what
    assert equal(whole["saved"].shared, resumed["saved"].shared)
    assert [w for w in whole["saved"].workers] == [w for w in resumed["saved"].workers]
    assert all(equal(whole["saved"].worker(w), resumed["saved"].worker(w)) for w in whole["saved"].workers)

    def curve(run: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(x["step"], x["name"], x["value"], x["bits_up"], x["bits_down"]) for x in run["lines"]]

    assert curve(whole) == curve(resumed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forecast_equals_the_meter(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    method, changes = case
    predicted = federated.forecast(recipe(method, **changes))
    run = train(str(tmp_path), method, changes)
    parts = {name: {"up": up, "down": down} for name, (up, down) in run["meter"].items()}
    assert predicted.details["parts"] == parts
    assert (predicted.up, predicted.down) == (sum(p["up"] for p in parts.values()), sum(p["down"] for p in parts.values()))
    assert predicted.steps == recipe(method, **changes).train.rounds


def test_a_schedule_that_reaches_zero_is_forecast(tmp_path: Path) -> None:
    changes = {"schedule": "{name: step, milestones: [0.3], gamma: 1.0e-35}", "train.rounds": 4}
    run = train(str(tmp_path), "domo", changes)
    assert run["meter"]["momentum"][1] > 0
    assert federated.forecast(recipe("domo", **changes)).down == sum(d for _, d in run["meter"].values())


def test_half_an_epoch_goes_on_where_it_stopped() -> None:
    """Two rounds of half a pass see exactly the samples of one pass."""
    job = federated.build(recipe(**{"train.local_steps": "null", "train.local_epochs": 0.5, "train.batch_size": 5}), Context())
    shard = job.parts[1]
    assert (shard.per_pass, shard.steps) == (12, 6)
    order = shard.order(1, 0, 0)
    from xutrain.loops.clients import ClientData

    seen = []
    for taken in (0, 6):
        data = ClientData(job.bench, 1, shard, taken)
        for step in range(6):
            data.batch(step)
            assert data._order is not None
            at = (taken + step) * 5
            seen.append(data._order[1][at : at + 5])
    assert torch.equal(torch.cat(seen), order)


@pytest.mark.parametrize(("epochs", "steps"), [(0.29, 29), (0.07, 7), (0.005, 1), (1.11, 111)])
def test_part_of_a_pass_is_not_lost_to_rounding(epochs: float, steps: int) -> None:
    """P = max(1, floor(E N_k / b)); 0.29 x 100 is 28.999999999999996 in floating point."""
    value = recipe(
        **{"train.local_steps": "null", "train.local_epochs": epochs, "clients.count": 2, "data.subset": 200, "train.batch_size": 1}
    )
    assert {s.steps for s in federated.build(value, Context()).parts} == {steps}


def test_clients_are_sampled_by_key() -> None:
    job = federated.build(recipe(**{"clients.fraction": 0.5}), Context())
    chosen = [federated.plan_round(recipe(**{"clients.fraction": 0.5}), job, r).clients for r in range(30)]
    assert all(len(c) == 2 and tuple(sorted(c)) == c for c in chosen)
    assert {k for c in chosen for k in c} == {0, 1, 2, 3} and len(set(chosen)) > 3
    setting = federated.plan_round(recipe(**{"clients.fraction": 0.5}), job, 0)
    assert sum(setting.weights) == pytest.approx(1)


def test_validation_stays_with_its_client() -> None:
    job = federated.build(recipe(**{"clients.val_fraction": 0.2}), Context())
    for shard in job.parts:
        assert len(shard.val) == 12 and not set(shard.val.tolist()) & set(shard.train.tolist())
    from xutrain.loops.clients import ClientData

    data = ClientData(job.bench, 0, job.parts[0], 0)
    assert 0 <= data.evaluate(job.server["model"])["accuracy"] <= 1
    assert data.evaluate(job.server["model"], "train")["loss"] > 0


def test_central_does_as_many_passes_as_the_clients() -> None:
    job = federated.build(recipe("central", **{"train.local_steps": "null"}), Context())
    other = federated.build(recipe("fedavg", **{"train.local_steps": "null"}), Context())
    assert job.parts[0].batch_size == 4 * other.parts[0].batch_size
    assert job.parts[0].steps == other.parts[0].steps
    assert sum(len(s.train) for s in job.parts) == 240


def test_error_feedback_keeps_what_the_codec_lost(tmp_path: Path) -> None:
    from xutrain.registry import entries as parts

    contractive = [e.name for e in parts("codec") if e.name in ("scaled_sign", "onebit")]
    if not contractive:
        pytest.skip("no contractive codec here")
    run = train(str(tmp_path), "fedavg", {"codec": f"{{name: {contractive[0]}}}", "uplink.error_feedback": "always"})
    assert run["saved"].worker(0)["residual"]["update"].abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "where", "word"),
    [
        ({"clients.count": 300, "train.batch_size": 1}, "clients.count", "more clients than the 240"),
        ({"partition.name": "classes", "partition.per_client": 2}, "partition", "no client has a sample of class 8, 9"),
        ({"partition.s": 1.5}, "partition.s", "at most 1"),
        ({"partition.s": -0.1}, "partition.s", "at least 0"),
        ({"method.server_momentum": 1.0}, "method.server_momentum", "less than 1"),
        ({"method.local_momentum": 1}, "method.local_momentum", "less than 1"),
        ({"train.batch_size": 100}, "train.batch_size", "larger than the shard"),
        ({"clients.val_fraction": 0.001}, "clients.val_fraction", "0 validation"),
        ({"partition.name": "dirichlet", "partition.alpha": 0.0}, "partition.alpha", "greater than 0"),
        ({"partition.name": "dirichlett"}, "partition.name", "unknown partition"),
        ({"method.betta": 1}, "method.betta", "unknown key"),
        ({"codec.name": "signsgd"}, "codec.name", "takes a vote"),
        ({"codec.name": "low_rank"}, "codec.name", "unknown codec for federate"),
        ({"clients.fraction": 0}, "clients.fraction", "greater than 0"),
        ({"train.rounds": 0}, "train.rounds", "at least 1"),
    ],
)
def test_bad_input_is_named_before_the_first_round(tmp_path: Path, changes: dict[str, Any], where: str, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        train(str(tmp_path), "domo", changes)
    assert caught.value.exit_code == 2
    assert where in [issue.where for issue in caught.value.issues]
    assert word in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_divergence_names_client_and_round(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"round \d+, client \d"):
        train(str(tmp_path), "fedavg", {"train.lr": 1e3, "train.weight_decay": 1e3, "train.rounds": 9})


def test_a_client_with_statistics_of_its_own_begins_with_the_initial_ones() -> None:
    """Whoever joins late under ``train.buffers: local`` has seen nothing of what the others measured."""
    from xutrain.methods.federate.base import Round

    more = {"model": "{name: resnet_cifar, depth: 8, width: 4}", "train.buffers": "local", "clients.fraction": 0.5}
    late, first = (federated.build(recipe("fedavg", **more), Context()) for _ in range(2))
    federated.play(late, Round(0, 1e-20, (0, 1), (3, 3), (0.5, 0.5)))
    for job in (late, first):
        federated.play(job, Round(1, 1e-20, (2,), (3,), (1.0,)))
    ours, theirs = late.kept[2].buffers, first.kept[2].buffers
    assert ours is not None and theirs is not None and torch.equal(ours, theirs)
