"""Every codec through the whole runner: any number of processes, stop and resume, predicted bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xutrain import registry
from xutrain.engine.record import read_json
from xutrain.errors import RecipeError
from xutrain.loops.data_parallel import forecast
from xutrain.recipe.load import load
from xutrain.worker import open_recipe

_spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec and _spec.loader
_shared: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
weights, values = _shared.weights, _shared.values

CODECS = [e.name for e in registry.entries("codec", "quantize")]
SHORT = ["train.steps=6", "eval.every=3", "log.every=2", "model.hidden=[24]"]
EXTRA = {"signsgd": ["optimizer.lr=0.001"]}


def _recipe(codec: str) -> list[str]:
    return [f"codec={codec}", *SHORT, *EXTRA.get(codec, [])]


@pytest.mark.parametrize("codec", CODECS)
def test_bit_equal_on_any_number_of_processes(trained: Callable[..., Path], codec: str) -> None:
    alone = trained("orq", _recipe(codec), 1, out="1")
    for processes in (2, 4):
        shared = trained("orq", _recipe(codec), processes, out=str(processes))
        assert weights(shared) == weights(alone)
        assert values(shared) == values(alone)


@pytest.mark.parametrize("buffers", ["mean", "first", "local"])
def test_batch_norm_on_any_number_of_processes(trained: Callable[..., Path], buffers: str) -> None:
    """Statistics, and the count of batches that one worker has seen."""
    over = ["model.name=resnet_cifar", "model.depth=8", "model.width=4", f"train.buffers={buffers}", "train.steps=3"]
    alone = trained("orq", over, 1, out="1")
    assert weights(trained("orq", over, 2, out="2")) == weights(alone)
    from safetensors.torch import load_file

    model = load_file(alone / "checkpoints" / "step-000003" / "model.safetensors")
    assert int(model["bn.num_batches_tracked"]) == 3


@pytest.mark.parametrize("mode", ["alltoall", "ps"])
@pytest.mark.parametrize("codec", ["fp", "orq", "bingrad_b", "eden"])
def test_exchange_modes_on_any_number_of_processes(trained: Callable[..., Path], codec: str, mode: str) -> None:
    over = [*_recipe(codec), f"exchange.mode={mode}"] + ([f"codec.bucket={64}"] if codec != "fp" else [])
    alone = trained("orq", over, 1, out="1")
    assert weights(trained("orq", over, 2, out="2")) == weights(alone)
    state = read_json(alone / "state.json")["result"]["bits"]
    assert state == forecast(open_recipe(alone)).bits


@pytest.mark.parametrize("codec", CODECS)
def test_stop_and_resume_equals_uninterrupted(trained: Callable[..., Path], codec: str) -> None:
    over = [*_recipe(codec), *(["method.error_feedback=true"] if codec in ("bingrad_b", "pb_orq") else [])]
    whole = trained("orq", over, 1, out="whole")
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    folder = plan(load("orq", None, over), out=whole.parents[4] / "cut").folder
    folder.mkdir(parents=True)
    (folder / "STOP").write_text("4")
    trained("orq", over, 1, out="cut")
    assert read_json(folder / "state.json")["status"] == "stopped"
    assert (folder / "checkpoints" / "step-000004").is_dir()
    (folder / "STOP").unlink()
    trained("orq", over, 2, out="cut")  # and on another number of processes
    assert weights(folder) == weights(whole)
    assert values(folder) == values(whole)


@pytest.mark.parametrize("codec", CODECS)
def test_predicted_bits_equal_the_meter(trained: Callable[..., Path], codec: str) -> None:
    folder = trained("orq", _recipe(codec), 1)
    result = read_json(folder / "state.json")["result"]
    assert result["bits"] == forecast(open_recipe(folder)).bits
    assert result["bits"]["up"] > 0


def test_ring_is_close_to_exact_and_counts_as_a_ring(trained: Callable[..., Path]) -> None:
    exact = read_json(trained("fp", SHORT, 2, out="exact") / "state.json")["result"]
    ring = read_json(trained("fp", [*SHORT, "exchange.reduction=ring"], 2, out="ring") / "state.json")["result"]
    assert ring["metrics"]["train_loss"] == pytest.approx(exact["metrics"]["train_loss"], rel=1e-5)
    elements = ring["bits"]["per_worker_step"] / 32
    assert ring["bits"]["down"] == 2 * 3 * 32 * elements * 6  # 2 (K-1)/K per worker, K workers, 6 steps


def test_error_feedback_keeps_what_was_not_sent() -> None:
    """sum of sent + residual = sum of produced, for every worker."""
    import torch

    from xutrain.engine.context import Context
    from xutrain.methods.base import Setup
    from xutrain.methods.exchange import Exchange
    from xutrain.methods.quantize.sgd import QuantizedSGD
    from xutrain.recipe.resolve import options
    from xutrain.recipe.schema import Optimizer

    ctx = Context(seed=1)
    cls, chosen = options("codec", "bingrad_b", {"bucket": 16})
    workers = ctx.workers(3)
    exchange = Exchange(workers, cls(chosen, workers=3), ctx.meter)
    setup = Setup(torch.zeros(40), [], workers, exchange, Optimizer(lr=1.0, momentum=0.0), ctx, 5, None)
    method = QuantizedSGD(QuantizedSGD.Options(name="sgd", error_feedback=True), setup)
    made = torch.zeros(40)
    for step in range(5):
        grads = [torch.randn(40, generator=ctx.key("g", step, w).generator()) for w in range(3)]
        made += sum(grads) / 3
        method.step(grads, 1.0, step)
    kept = sum(method.error) / 3
    assert torch.allclose(-method.x + kept, made, atol=1e-5)


@pytest.mark.parametrize(
    ("over", "where"),
    [
        (["exchange.mode=alltoall"], "exchange.mode"),
        (["codec=signsgd"], "scaled_sign"),
        (["codec={name: random_k, ratio: 8, rescale: true}"], "rescale"),
    ],
)
def test_what_error_feedback_does_not_survive(over: list[str], where: str) -> None:
    load("quantize/orq", None, over)
    with pytest.raises(RecipeError, match=where):
        load("quantize/orq", None, [*over, "method.error_feedback=true"])
