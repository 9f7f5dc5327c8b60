"""Runs of the loop: any number of processes, resumed or not, with predicted bits; another number of workers; bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xutrain.engine.checkpoint import Checkpoints
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.errors import Diverged, RecipeError, Stopped
from xutrain.loops import data_parallel
from xutrain.recipe.load import from_dict

BLOCK: dict[str, Any] = {"name": "random_block", "ratio": 16}
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"name": "sgd"}, {"name": "fp"}, {}),
    ({"name": "sgd"}, {"name": "top_k", "ratio": 10}, {}),
    ({"name": "ef"}, {"name": "scaled_sign", "scope": "tensor"}, {}),
    ({"name": "ef", "period": 2}, {"name": "random_k", "ratio": 16}, {}),
    ({"name": "ef", "two_way": True}, {"name": "top_k", "ratio": 10}, {}),
    ({"name": "saef", "average_every": 2, "average_momentum": True}, {"name": "top_k", "ratio": 10, "scope": "flat"}, {}),
    ({"name": "saef", "two_way": True, "init": "zero", "eval_point": "local"}, {"name": "scaled_sign", "scope": "global"}, {}),
    ({"name": "saef", "coeff": 0.5}, {"name": "orq", "levels": 5}, {"mode": "ps"}),
    ({"name": "saef"}, {"name": "bingrad_b"}, {}),
    ({"name": "def"}, BLOCK, {}),
    ({"name": "def", "coeff": "adaptive"}, {**BLOCK, "balanced": True}, {}),
    ({"name": "def", "coeff": "adaptive"}, {**BLOCK, "scope": "flat"}, {"mode": "ps"}),
    ({"name": "def_a", "period": 3}, {**BLOCK, "scope": "grid"}, {}),
    ({"name": "def"}, {"name": "low_rank", "rank": 2}, {}),
    ({"name": "pef"}, BLOCK, {"mode": "ps"}),
    ({"name": "powersgd"}, {"name": "low_rank", "rank": 1}, {}),
    ({"name": "cser"}, BLOCK, {}),
    ({"name": "cser", "reset_every": 3, "step_codec": {"name": "random_block", "ratio": 32}}, {"name": "random_block", "ratio": 8}, {}),
    ({"name": "dist_ef_sgd"}, {"name": "scaled_sign", "scope": "tensor"}, {}),
    ({"name": "sgd_ia", "ratio": 8}, {"name": "fp"}, {}),
    ({"name": "saef", "reset_every": 3, "average_every": 2}, {"name": "top_k", "ratio": 10}, {}),
]
IDS = ["-".join([str(v) for part in case for v in part.values()]).replace("/", "") for case in CASES]


def recipe(method: dict[str, Any], codec: dict[str, Any], exchange: dict[str, Any] | None = None, **other: Any) -> Any:
    raw: dict[str, Any] = {
        "data": {"name": "digits", "subset": 200, "test_subset": 40},
        "model": {"name": "mlp", "hidden": [12]},
        "workers": 4,
        "train": {"steps": 6, "batch_size": 4},
        "optimizer": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "step", "milestones": [0.5]},
        "eval": {"every_epochs": None},
        "method": dict(method),
        "codec": dict(codec),
        "exchange": dict(exchange or {}),
    }
    return from_dict("sparsify", {**raw, **other})


def train(chosen: Any, folder: str) -> tuple[dict[str, float], int, int, torch.Tensor]:
    """Metrics, counted bits up and down, and the saved model, on every process."""
    torch.set_num_threads(1)
    ctx = Context.open(chosen.seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    record = Record(Path(folder), ctx.meter, seed=chosen.seed, is_main=ctx.is_main)
    metrics = data_parallel.run(chosen, ctx, record)
    saved = Checkpoints(Path(folder), chosen.checkpoint, ctx).latest()
    assert saved is not None
    return metrics, ctx.meter.up, ctx.meter.down, torch.cat([v.reshape(-1).float() for v in saved.model().values()])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_one_process_equals_many_and_the_forecast(case: Any, forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    chosen = recipe(*case)
    metrics, up, down, model = train(chosen, str(tmp_path / "one"))
    for other in forked(train, 2, chosen, str(tmp_path / "two")):
        assert other[0] == metrics and other[1:3] == (up, down)
        assert torch.equal(other[3], model)
    predicted = data_parallel.forecast(chosen)
    assert (predicted.up, predicted.down) == (up, down)
    assert all(math.isfinite(v) for v in metrics.values())


def test_four_processes(forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    chosen = recipe({"name": "def"}, BLOCK)
    one = train(chosen, str(tmp_path / "one"))
    for other in forked(train, 4, chosen, str(tmp_path / "four")):
        assert other[0] == one[0] and torch.equal(other[3], one[3])


@pytest.mark.parametrize("codec", [BLOCK, {"name": "low_rank", "rank": 1}], ids=["block", "low_rank"])
def test_ring(codec: dict[str, Any], forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Plain all-reduce adds in another order; its bits are 2 (K - 1) slices."""
    exact = train(recipe({"name": "def"}, codec), str(tmp_path / "exact"))
    ring = recipe({"name": "def"}, codec, {"reduction": "ring"})
    results = forked(train, 4, ring, str(tmp_path / "ring"))
    predicted = data_parallel.forecast(ring)
    for _metrics, up, down, model in results:
        assert torch.allclose(model, exact[3], atol=1e-5)
        assert (up, down) == (predicted.up, predicted.down) == (exact[1], exact[2] * 2 // 4)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_stopped_and_resumed_is_bit_equal(case: Any, tmp_path: Path) -> None:
    whole = train(recipe(*case), str(tmp_path / "whole"))
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "STOP").write_text("3")
    with pytest.raises(Stopped):
        train(recipe(*case), str(folder))
    (folder / "STOP").unlink(missing_ok=True)
    parts = train(recipe(*case), str(folder))
    assert parts[0] == whole[0] and parts[1:3] == whole[1:3]
    assert torch.equal(parts[3], whole[3])


def stop_at(step: int, chosen: Any, folder: Path) -> None:
    folder.mkdir()
    (folder / "STOP").write_text(str(step))
    with pytest.raises(Stopped):
        train(chosen, str(folder))


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[9], CASES[17]], ids=[IDS[3], IDS[5], IDS[9], IDS[17]])
def test_another_number_of_workers_keeps_the_virtual_point(case: Any, tmp_path: Path) -> None:
    stop_at(4, recipe(*case), tmp_path / "four")
    ctx = Context()
    saved = Checkpoints(tmp_path / "four", recipe(*case).checkpoint, ctx).latest()
    assert saved is not None
    before = data_parallel.build(recipe(*case), ctx)
    before.method.load_state(saved.shared["method"], saved.worker)
    for workers in (1, 2, 8):
        other = recipe(*case, workers=workers, train={"steps": 6, "batch_size": 16 // workers}, resume_from=str(tmp_path / "four"))
        after = data_parallel.build(other, Context())
        folder = tmp_path / f"adopted{workers}"
        folder.mkdir()
        record = Record(folder, after.exchange.meter, seed=0, is_main=True)
        assert data_parallel._adopt(after, other, Context(), record) == 4
        for name in ("x", "y"):
            assert torch.allclose(after.method.deploy()[name], before.method.deploy()[name], atol=1e-7, rtol=0), name
        metrics, up, down, _ = train(other, str(tmp_path / f"run{workers}"))
        predicted = data_parallel.forecast(other)
        assert (up, down) == (predicted.up, predicted.down) and math.isfinite(metrics["test_loss"])


@pytest.mark.parametrize(
    ("method", "codec", "exchange", "where", "says"),
    [
        ({"name": "def"}, {**BLOCK, "ratio": 0.5}, {}, "codec.ratio", "1"),
        ({"name": "def"}, {"name": "top_k", "ratio": 0}, {}, "codec.ratio", "1"),
        ({"name": "def", "period": 0}, BLOCK, {}, "method.period", "1"),
        ({"name": "def", "coeff": 1.5}, BLOCK, {}, "method.coeff", "[0, 1]"),
        ({"name": "def", "coeff": -0.1}, BLOCK, {}, "method.coeff", "[0, 1]"),
        ({"name": "saef", "coeff": 1.5}, BLOCK, {}, "method.coeff", "1"),
        ({"name": "def", "coeff": "adaptive"}, {"name": "top_k"}, {}, "method.coeff", "same coordinates"),
        ({"name": "saef", "two_way": True, "server_residual": False}, {"name": "top_k"}, {}, "method.server_residual", "true"),
        ({"name": "ef", "two_way": True}, BLOCK, {}, "method.two_way", "false"),
        ({"name": "ef"}, {"name": "random_k", "ratio": 8, "rescale": True}, {}, "codec", "grow"),
        ({"name": "ef"}, {"name": "signsgd"}, {}, "codec", "scaled_sign"),
        ({"name": "ef"}, {"name": "orq"}, {"mode": "alltoall"}, "exchange.mode", "second time"),
        ({"name": "powersgd"}, BLOCK, {}, "codec.name", "low_rank"),
        ({"name": "saef", "local_optimizer": "adagrad"}, BLOCK, {}, "optimizer.momentum", "momentum=0"),
        ({"name": "dist_ef_sgd", "local_optimizer": "adagrad"}, BLOCK, {}, "method.local_optimizer", "sgd"),
        ({"name": "saef", "recalibrate_bn": -1}, BLOCK, {}, "method.recalibrate_bn", "0"),
        ({"name": "cser", "step_codec": "signsgd"}, BLOCK, {}, "method.step_codec", "scaled_sign"),
    ],
)  # fmt: skip
def test_bad_input(method: dict[str, Any], codec: dict[str, Any], exchange: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(method, codec, exchange)
    found = [issue for issue in error.value.issues if issue.where.startswith(where)]
    assert found and says in "\n".join(found[0].lines()), error.value


def test_ratio_above_every_tensor() -> None:
    with pytest.raises(RecipeError, match="allowed are 1 to 768"):
        data_parallel.forecast(recipe({"name": "def"}, {**BLOCK, "ratio": 1000}))
    data_parallel.forecast(recipe({"name": "def"}, {"name": "random_block", "ratio": 900, "scope": "flat"}))


def test_resume_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="resume_from"):
        recipe({"name": "def"}, BLOCK, resume_from=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"name": "pef"}}, "holds no optimizer"),
        ({"method": {"name": "def"}}, "holds no coeff, moments"),
        ({"method": {"name": "cser"}}, "holds no deviation"),
        ({"model": {"name": "mlp", "hidden": [11]}}, "parameters"),
        ({"train": {"steps": 3, "batch_size": 4}}, "at step 3 already"),
    ],
)
def test_resume_from_what_does_not_fit(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    stop_at(3, recipe({"name": "ef"}, BLOCK), tmp_path / "ef")
    chosen = recipe(changes.pop("method", {"name": "ef"}), BLOCK, resume_from=str(tmp_path / "ef"), **changes)
    with pytest.raises(RecipeError, match=says):
        data_parallel.forecast(chosen)
    with pytest.raises(RecipeError, match=says):
        train(chosen, str(tmp_path / "other"))


def adopted(chosen: Any, folder: Path) -> Any:
    folder.mkdir()
    job = data_parallel.build(chosen, Context())
    data_parallel._adopt(job, chosen, Context(), Record(folder, job.exchange.meter, seed=0, is_main=True))
    return job.method


def test_who_goes_on_with_another_coefficient_gets_it(tmp_path: Path) -> None:
    stop_at(3, recipe({"name": "def", "coeff": 0.3}, BLOCK), tmp_path / "from")
    assert adopted(recipe({"name": "def", "coeff": 0.5}, BLOCK, resume_from=str(tmp_path / "from")), tmp_path / "to").coeff == 0.5


def test_a_server_may_come_and_go(tmp_path: Path) -> None:
    """What the server has left out is not lost with it, and a new server begins with nothing."""
    codec = {"name": "top_k", "ratio": 10}
    for before in (True, False):
        first = recipe({"name": "ef", "two_way": before}, codec)
        folder = tmp_path / f"from{before}"
        stop_at(3, first, folder)
        saved = Checkpoints(folder, first.checkpoint, Context()).latest()
        assert saved is not None
        same = data_parallel.build(first, Context()).method
        same.load_state(saved.shared["method"], saved.worker)
        other = adopted(recipe({"name": "ef", "two_way": not before}, codec, resume_from=str(folder)), tmp_path / f"to{before}")
        assert (other.server is None) == before
        assert torch.allclose(other.virtual(), same.virtual(), atol=1e-6, rtol=0)


def test_the_mean_of_batch_norm_statistics_is_counted_as_it_travels() -> None:
    for reduction, down in (("exact", 4 * 3), ("ring", 2 * 3)):
        chosen = recipe({"name": "ef"}, BLOCK, {"reduction": reduction}, model={"name": "resnet_cifar", "depth": 8, "width": 4})
        job = data_parallel.build(chosen, Context())
        bits = 32 * job.replica.num_buffer_elements
        assert bits and data_parallel._buffer_bits("mean", job) == (4 * bits, down * bits)


def test_unproven_codecs_are_named(tmp_path: Path) -> None:
    chosen = recipe({"name": "ef"}, {"name": "terngrad"}, train={"steps": 1, "batch_size": 4})
    assert "terngrad" in data_parallel.build(chosen, Context()).method.notes()[0]


def test_nan_gradient_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random block would carry a NaN only when it covers it; the loop refuses it at once (exit code 4)."""
    chosen = recipe({"name": "def"}, BLOCK, checkpoint={"every": 2})
    real = data_parallel.gradient

    def poisoned(r: Any, ctx: Any, job: Any, slot: int, worker: int, step: int) -> tuple[float, torch.Tensor]:
        loss, grad = real(r, ctx, job, slot, worker, step)
        if step == 3 and worker == 2:
            grad[-1] = float("nan")
        return loss, grad

    monkeypatch.setattr(data_parallel, "gradient", poisoned)
    with pytest.raises(Diverged, match="step 3, worker 2") as error:
        train(chosen, str(tmp_path))
    assert error.value.exit_code == 4
    saved = Checkpoints(tmp_path, chosen.checkpoint, Context()).latest()
    assert saved is not None and saved.step == 2
    assert all(bool(torch.isfinite(v).all()) for v in saved.model().values())
    monkeypatch.undo()
    train(chosen, str(tmp_path))


def test_adagrad_stopped_and_resumed_on_two_processes(forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    chosen = recipe({"name": "def", "local_optimizer": "adagrad"}, BLOCK, optimizer={"lr": 0.05, "momentum": 0.0, "weight_decay": 5e-4})
    whole = train(chosen, str(tmp_path / "whole"))
    stop_at(3, chosen, tmp_path / "parts")
    (tmp_path / "parts" / "STOP").unlink(missing_ok=True)
    for other in forked(train, 2, chosen, str(tmp_path / "parts")):
        assert other[0] == whole[0] and torch.equal(other[3], whole[3])


def test_recalibrated_batch_norm(forked: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Statistics of the saved model are the plain means over the first batches at the saved weights; training sees none of it."""
    small = {"model": {"name": "resnet_cifar", "depth": 8, "width": 4}, "train": {"steps": 2, "batch_size": 4}}
    plain, wanted = (recipe({"name": "saef", "recalibrate_bn": n}, BLOCK, **small) for n in (0, 6))
    before, after = train(plain, str(tmp_path / "plain")), train(wanted, str(tmp_path / "wanted"))
    assert forked(train, 2, wanted, str(tmp_path / "two"))[1][0] == after[0] != before[0]
    states = []
    for chosen, folder in ((plain, "plain"), (wanted, "wanted")):
        saved = Checkpoints(tmp_path / folder, chosen.checkpoint, Context()).latest()
        assert saved is not None
        states.append(saved.model())
    learnt = [n for n in states[0] if "running" not in n and "num_batches" not in n]
    assert all(torch.equal(states[0][n], states[1][n]) for n in learnt)
    assert before[1] == after[1]
    job = data_parallel.build(wanted, Context())
    module = job.replica.module
    module.load_state_dict(states[1])
    seen: list[torch.Tensor] = []
    first, norm = next((n, m) for n, m in module.named_modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    module.eval()
    with torch.no_grad():
        for i in range(6):
            module(job.task.draw(i // 4, i % 4, 4, 4, wanted.seed).inputs)
    assert torch.allclose(states[1][f"{first}.running_mean"], torch.stack([v.mean((0, 2, 3)) for v in seen]).mean(0), atol=1e-5)
    assert torch.allclose(states[1][f"{first}.running_var"], torch.stack([v.var((0, 2, 3)) for v in seen]).mean(0), rtol=1e-4)
