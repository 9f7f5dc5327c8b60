"""What DSP and its baselines compute, against back-propagation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pipeline.conftest import CONFIGURATIONS, make, same
from xutrain.data.base import Batch
from xutrain.engine.context import Context
from xutrain.loops.pipeline_job import build

FROZEN = 1e-30  # a learning rate that changes no float32 weight


def test_one_stage_is_plain_sgd(trained: Any) -> None:
    chosen = make("dsp", stages=1, optimizer__nesterov="true", optimizer__weight_decay=0.001)
    pipeline = trained(chosen)
    job = build(chosen, Context(0))
    stage = job.stages[0]
    optimizer = torch.optim.SGD(stage.block.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.001)
    losses = []
    for step in range(chosen.train.steps):
        batch = job.task.draw(step, 0, 1, 20, 0)
        loss = torch.nn.functional.cross_entropy(stage.block(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.equal(a, b) for a, b in zip(stage.block.state_dict().values(), pipeline.job.state_dict().values(), strict=True))
    logged = [line["value"] for line in pipeline.record.read() if line["name"] == "batch_loss"]
    assert logged == losses[9:10] + losses[11:]


@pytest.mark.parametrize(("p", "m"), CONFIGURATIONS)
def test_without_learning_dsp_is_back_propagation(trained: Any, p: list[int], m: list[int]) -> None:
    words = {"stages": len(p), "optimizer__lr": FROZEN, "model__norm": "true", "model__dropout": 0.3, "model__depth": 5}
    dsp = trained(make({"name": "dsp", "p": p, "m": m}, **words))
    bp = trained(make("bp", **words))
    assert same(dsp.grads, bp.grads)
    assert same(dsp.job.state_dict(), bp.job.state_dict())  # running statistics counted once a batch
    assert next(v for n, v in dsp.job.state_dict().items() if "num_batches" in n) == 12


@pytest.mark.parametrize(
    "method",
    ["fr", "ddg", {"name": "ddg", "mix": True}, "pipedream", {"name": "fdg", "shrink": 1.0}, "pipemare"],
    ids=lambda m: m if isinstance(m, str) else m["name"] + "+",
)
def test_without_learning_every_stale_method_is_back_propagation(trained: Any, method: Any) -> None:
    words = {"optimizer__lr": FROZEN, "model__norm": "true", "model__dropout": 0.3}
    stale, bp = trained(make(method, **words)), trained(make("bp", **words))
    assert same(stale.grads, bp.grads)
    assert same(_statistics(stale), _statistics(bp))


def _statistics(pipeline: Any) -> dict[str, torch.Tensor]:
    return {n: t for n, t in pipeline.job.state_dict().items() if "running" in n or "num_batches" in n}


def test_shrinkage_multiplies_lower_stages(trained: Any) -> None:
    plain = trained(make({"name": "fdg", "shrink": 1.0}, optimizer__lr=FROZEN))
    shrunk = trained(make({"name": "fdg", "shrink": 0.5}, optimizer__lr=FROZEN))
    for (stage, batch), grads in shrunk.grads.items():
        for name, grad in grads.items():
            assert torch.equal(grad, plain.grads[stage, batch][name] * 0.5 ** (2 - stage))


def test_stashing_equals_delayed_gradients(trained: Any) -> None:
    assert same(trained(make("pipedream")).grads, trained(make("ddg")).grads)


def test_pipemare_without_switches_is_dsp(trained: Any) -> None:
    off = {"name": "pipemare", "t1": False, "t2": False}
    assert same(trained(make(off)).grads, trained(make("dsp")).grads)
    assert not same(trained(make("pipemare")).grads, trained(make("dsp")).grads)


def test_mixed_delayed_gradients_differ_from_both(trained: Any) -> None:
    mix, ddg, fr = trained(make({"name": "ddg", "mix": True})), trained(make("ddg")), trained(make("fr"))
    assert not same(mix.grads, ddg.grads)
    assert not same(mix.grads, fr.grads)


@pytest.mark.parametrize("method", ["dsp", "fr", "ddg", "pipedream", "fdg", "pipemare", "dni", "gpipe", "1f1b"])
def test_one_stage_of_any_method_is_back_propagation(trained: Any, method: str) -> None:
    if method in ("gpipe", "1f1b"):
        method = {"name": method, "micro_batches": 1}  # type: ignore[assignment]
    assert same(trained(make(method, stages=1)).job.state_dict(), trained(make("bp", stages=1)).job.state_dict())


def test_back_propagation_does_not_see_the_cut(trained: Any) -> None:
    assert same(trained(make("bp", stages=4)).job.state_dict(), trained(make("bp", stages=1)).job.state_dict())


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_micro_batches_average_to_the_gradient(trained: Any, recompute: str) -> None:
    gpipe, bp = (
        trained(make({"name": "gpipe", "micro_batches": 5}, method__recompute=recompute, train__steps=2)),
        trained(make("bp", train__steps=2)),
    )
    for name, grad in bp.grads[0, 0].items():
        assert torch.allclose(gpipe.grads[0, 0][name], grad, atol=1e-6)


def _gap(trained: Any, p: list[int], m: list[int], lr: float) -> float:
    """Mean over batches of |G - G_true| / |G_true| of stage 0, G_true at the weights that each block had going backward."""
    chosen = make(
        {"name": "dsp", "p": p, "m": m}, stages=len(p), model__double="true", optimizer__lr=lr, optimizer__momentum=0.0, train__steps=30
    )
    pipeline = trained(chosen)
    job = pipeline.job
    gaps = []
    for b in range(m[0], 30):
        batch: Batch = job.task.draw(b, 0, 1, 20, 0)
        x = batch.inputs
        for stage in job.stages:
            stage.block.load_state_dict({**stage.block.state_dict(), **pipeline.weights[stage.index, b]})
            x = stage.block(x)
        loss = torch.nn.functional.cross_entropy(x, batch.targets)
        true = torch.autograd.grad(loss, list(job.stages[0].parameters.values()))
        found = list(pipeline.grads[0, b].values())
        gaps.append(
            float(sum((f - t).square().sum() for f, t in zip(found, true, strict=True)) / sum(t.square().sum() for t in true)) ** 0.5
        )
    return sum(gaps) / len(gaps)


def test_gap_to_the_true_gradient_is_of_first_order_in_the_learning_rate(trained: Any) -> None:
    small = {str(m): (_gap(trained, p, m, 1e-4), _gap(trained, p, m, 1e-3)) for p, m in CONFIGURATIONS[:4]}
    for low, high in small.values():
        assert 8 < high / low < 13
    gaps = [low for low, _ in small.values()]
    assert gaps == sorted(gaps)  # longer queues, larger gap


def test_learning_rate_is_that_of_the_applied_batch(trained: Any) -> None:
    words = {"optimizer__momentum": 0.0, "schedule__name": "linear"}
    pipeline = trained(make("dsp", **words))
    for stage in pipeline.job.stages:
        for b in range(11):
            before, after, grad = (d[stage.index, i] for d, i in ((pipeline.weights, b), (pipeline.weights, b + 1), (pipeline.grads, b)))
            for name, value in grad.items():
                assert torch.equal(after[name], before[name].add(value, alpha=-0.1 * (1 - b / 12)))


def test_synthetic_gradients_start_at_zero_and_learn(trained: Any) -> None:
    pipeline = trained(make("dni", train__steps=40, optimizer__momentum=0.0))
    assert all(bool((g == 0).all()) for g in pipeline.grads[0, 0].values())
    assert any(bool((g != 0).any()) for g in pipeline.grads[0, 39].values())
