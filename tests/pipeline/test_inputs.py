"""What cannot be run is refused before training, with the reason and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pipeline.conftest import make, same, watch
from xutrain import registry
from xutrain.data.base import Batch
from xutrain.engine.context import Context
from xutrain.engine.partition import balanced, cut, layer_seconds, layers_of
from xutrain.engine.pipes import Message, Queue
from xutrain.errors import Diverged, RecipeError, XutrainError
from xutrain.loops import pipeline_job, pipelined
from xutrain.methods.pipeline.base import Stage, frozen_statistics
from xutrain.methods.pipeline.dni import DNI
from xutrain.recipe.delays import Delays, dsp
from xutrain.recipe.pipeline import Split


@pytest.mark.parametrize(
    ("method", "words", "text"),
    [
        ({"name": "dsp", "p": [1, 1, 0], "m": [3, 2, 0]}, {}, "smallest valid m_0 is 4"),
        ({"name": "dsp", "p": [0, 1, 0], "m": [4, 2, 0]}, {}, "smallest valid p_0 is 1"),
        ({"name": "dsp", "p": [1, 1, 0], "m": [4, 2, 1]}, {}, "the last stage has no delay"),
        ({"name": "dsp", "p": [1, 0], "m": [2, 0]}, {}, "for 3 stages"),
        ({"name": "dsp", "q": [1, 1], "m": [4, 2, 0]}, {}, "says both q and m"),
        ({"name": "gpipe", "micro_batches": 3}, {}, "method.micro_batches=4"),
        ({"name": "1f1b", "micro_batches": 2}, {}, "at least as many micro-batches as stages=3"),
        ("dsp", {"split__cuts": "[3,2]"}, "must be 2 rising layer numbers"),
        ("dsp", {"train__precision": "bf16"}, "runs in fp32"),
        ("dsp", {"train__accumulate": 4}, "a stage applies the gradient of every batch"),
        ("dsp", {"train__buffers": "first"}, "owns its batch-norm statistics"),
        ("dps", {}, "did you mean dsp"),
    ],
)
def test_recipes_that_cannot_be(method: Any, words: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(method, **words)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"stages": 9}, "the network has only 6 layers"),
        ({"model__tied": "true", "stages": 6}, "share 4.0.weight"),
        ({"split__cuts": "[2,6]"}, "layers 0 to 5"),
        ({"train__batch_size": 500}, "larger than the 200 training samples"),
        ({"train__batch_size": 1, "model__norm": "true"}, "stage 0 cannot train on a single sample"),
    ],
)
def test_networks_that_cannot_be_cut(tmp_path: Path, words: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        watch(make("dsp", **words), tmp_path)
    assert text in str(caught.value)
    assert not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("method", "words", "text"),
    [
        ({"name": "gpipe", "micro_batches": 20}, {"model__norm": "true"}, "stage 0 cannot train on a single sample"),
        ("dni", {"train__batch_size": 1}, "at least 2 samples"),
    ],
)
def test_batches_too_small_for_a_method(tmp_path: Path, method: Any, words: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        watch(make(method, **words), tmp_path)


def test_tied_weights_inside_one_stage_are_fine(tmp_path: Path) -> None:
    recipe = make("dsp", model__tied="true", split__cuts="[1,2]", train__steps=2)
    found = watch(recipe, tmp_path).job.state_dict()
    task = registry.load("dataset", "digits").build(recipe.data, 0)
    registry.load("model", "test_net").build(recipe.model, task).load_state_dict(found)  # both names of the weight are there
    assert torch.equal(found["3.0.weight"], found["4.0.weight"])


def test_layers_that_work_in_place_are_timed_and_planned() -> None:
    layers = [nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)]
    assert all(forward > 0 for forward, _ in layer_seconds(layers, torch.randn(3, 4), 1))


def test_one_sample_of_one_pixel_is_too_small_for_a_synthesizer() -> None:
    method, stage = DNI(DNI.Options(), 2), Stage(0, 2, nn.Conv2d(1, 3, 8), None, 0, nn.functional.cross_entropy)
    with pytest.raises(RecipeError, match="at least 2 samples"):
        method.prepare(stage, torch.zeros(1, 3, 1, 1))
    method.prepare(stage, torch.zeros(2, 3, 1, 1))


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_running_statistics_of_any_norm_can_be_left_alone(kind: type) -> None:
    norm, x = kind(2, track_running_stats=True), torch.randn(3, 2, 4, 4)
    before = {n: t.clone() for n, t in norm.state_dict().items()}
    with frozen_statistics(norm):
        y = norm(x)
    assert same(norm.state_dict(), before) and torch.equal(norm(x), y) and not same(norm.state_dict(), before)


def test_inputs_that_change_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xutrain.data.images import ImageTask

    draw = ImageTask.draw

    def ragged(self: Any, step: int, *args: Any) -> Batch:
        batch = draw(self, step, *args)
        return Batch(batch.inputs[..., : 8 - step % 2], batch.targets)

    monkeypatch.setattr(ImageTask, "draw", ragged)
    with pytest.raises(XutrainError, match="one shape"):
        watch(make("dsp"), tmp_path)


def test_boundary_that_changes_shape() -> None:
    queue = Queue("the activation from stage 0 to stage 1", Message((2, 3), "float32"))
    queue.put(torch.zeros(2, 3))
    for other in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(RecipeError, match="every batch must cross a stage boundary in one shape"):
            queue.put(other)


def test_divergence_names_the_batch(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="the loss of batch"):
        watch(make("dsp", optimizer__lr=1e6, train__steps=200, optimizer__weight_decay=100), tmp_path)


def test_nesterov_without_momentum_is_plain(tmp_path: Path) -> None:
    plain = make("dsp", optimizer__momentum=0, train__steps=3)
    nesterov = make("dsp", optimizer__momentum=0, optimizer__nesterov="true", train__steps=3)
    assert same(watch(nesterov, tmp_path).job.state_dict(), watch(plain, tmp_path).job.state_dict())


def test_cuts(tmp_path: Path) -> None:
    ctx = Context(0)
    job = pipeline_job.build(make("bp", model__depth=5, stages=1), ctx)
    network = job.stages[0].block
    assert len(layers_of(network)) == 7
    assert cut(network, 3, Split(by="layers")) == [0, 3, 6, 7]
    assert cut(network, 5, Split(by="layers")) == [0, 1, 3, 4, 6, 7]
    parameters = cut(network, 2, Split(by="parameters"))
    assert parameters == [0, 2, 7]  # 1040 | 4 * 272 + 170
    assert cut(network, 2, Split(cuts=[5])) == [0, 5, 7]
    assert balanced([1, 1, 1, 9], 2) == [0, 3, 4]
    assert balanced([5], 1) == [0, 1]
    timed = watch(make("dsp", split__by="time", train__steps=2), tmp_path)
    assert len(timed.job.bounds) == 4


def test_drawing_and_table(tmp_path: Path) -> None:
    from xutrain.loops.pipeline_ledger import table

    rows = table(Delays((1, 1, 0), (4, 2, 0)), 3)
    assert len(rows[0]) == 3 + 4
    assert rows[0] == [(0, None), (1, None), (2, None), (None, None), (None, 0), (None, 1), (None, 2)]
    assert rows[2][2:5] == [(0, 0), (1, 1), (2, 2)]
    assert dsp([1, 1], [1, 1], None, 3) == dsp(None, None, [4, 2, 0], 3) == Delays((1, 1, 0), (4, 2, 0))


def test_last_stage_alone_reads_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"batch_loss"} <= {line["name"] for line in watch(make("dsp"), tmp_path).record.read()}
    assert Stage.last.fget is not None
    assert pipelined.segments_of(make("dsp", checkpoint__every=5), 12, 10) == [(0, 5), (5, 10), (10, 12)]
    assert pipelined.segments_of(make("dsp", checkpoint__every=5, runtime__drain="end"), 12, 10) == [(0, 12)]
    assert pipelined.segments_of(make("dsp", runtime__drain="epoch"), 12, 10) == [(0, 10), (10, 12)]
