"""What the quantizers do to training on real digits (K = 4, 150 steps, two seeds): the orderings that hold beyond noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xutrain.errors import Diverged

CODECS = {
    "fp": ["codec=fp"],
    "orq-3": ["codec.levels=3"],
    "orq-5": ["codec.levels=5"],
    "orq-9": ["codec.levels=9"],
    "terngrad": ["codec=terngrad"],
    "terngrad-clip": ["codec=terngrad", "codec.clip=2.5"],
    "qsgd-5": ["codec=qsgd", "codec.levels=5"],
    "bingrad-b": ["codec=bingrad_b"],
    "bingrad-pb": ["codec=bingrad_pb"],
    "scaled-sign": ["codec=scaled_sign"],
    "qsgd-l2-3": ["codec=qsgd", "codec.levels=3", "codec.norm=l2"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float]]:
    """Mean accuracy and training loss over two seeds of a codec of the table above."""
    from xutrain.launch.api import run

    out, known = tmp_path_factory.mktemp("training"), {}  # type: Path, dict[str, dict[str, float]]

    def of(name: str) -> dict[str, float]:
        if name not in known:
            sections = {"train.steps": 150, "eval.every_epochs": None, "log.every": 1000}
            for text in CODECS[name]:
                key, value = text.split("=")
                sections[key] = int(value) if value.isdigit() else float(value) if "." in value else value
            known[name] = run("quantize/orq", seeds=[0, 1], out=out, **sections)["mean"]
        return known[name]

    return of


@pytest.mark.parametrize("name", [n for n in CODECS if n != "qsgd-l2-3"])
def test_trains(results: Callable[[str], dict[str, float]], name: str) -> None:
    assert results(name)["test_accuracy"] > 0.93


def test_fewer_levels_and_more_bias_cost_loss(results: Callable[[str], dict[str, float]]) -> None:
    assert results("orq-3")["train_loss"] < results("bingrad-b")["train_loss"] < results("scaled-sign")["train_loss"]


def test_the_l2_norm_is_useless_at_three_levels(results: Callable[[str], dict[str, float]]) -> None:
    """Its error is some thirty times the vector: it diverges, or stays near chance."""
    try:
        accuracy = results("qsgd-l2-3")["test_accuracy"]
    except Diverged:
        return
    assert accuracy < 0.6
