"""`xutrain bench`, and dry runs that predict step times: output, JSON, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from xutrain.cli.app import run
from xutrain.engine.network import Link
from xutrain.launch.foresee import Alone, break_even, step_time
from xutrain.loops.data_parallel import forecast
from xutrain.recipe import catalog
from xutrain.recipe.load import load

SMALL = ["--config", "orq", "model.hidden=[16]", "train.steps=4"]


def _json(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_a_dry_run_predicts_a_step(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = _json(
        ["quantize", *SMALL, "--dry-run", "--bandwidth", "100Mbit", "--latency", "1ms", "--compute", "20ms", "--workers", "8"], capfd
    )
    time = found["step_time"]
    assert (time["workers"], time["bandwidth"], time["latency_s"], time["gradient_s"]) == (8, 1e8, 1e-3, 0.02)
    assert time["step_s"] == pytest.approx(time["gradient_s"] + time["codec_s"] + time["wire_s"])
    payload = found["bits"]["per_worker_step"]
    assert time["wire_s"] == pytest.approx(7 * (1e-3 + payload / 1e8))
    full = 0.02 + 14 * 1e-3 + 2 * 7 / 8 * 32 * found["forecast"]["parameters"] / 1e8
    assert time["fp32_all_reduce_step_s"] == pytest.approx(full)
    assert time["speed_up"] == pytest.approx(full / time["step_s"])
    assert found["plan"]["participants"] == 8


def test_people_read_it_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", *SMALL, "--dry-run", "--bandwidth", "1Gbit"]) == 0
    text = capfd.readouterr().out
    assert "a step of 4 workers" in text and "ahead of fp32 at" in text and "timed here" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", *SMALL, "--bandwidth", "1Gbit"], "add --dry-run"),
        (["quantize", *SMALL, "--workers", "8"], "set workers=N"),
        (["quantize", *SMALL, "--dry-run", "--latency", "5us"], "--bandwidth: is missing"),
        (["quantize", *SMALL, "--dry-run", "--bandwidth", "5"], "positive rate with its unit"),
        (["quantize", *SMALL, "--dry-run", "--bandwidth", "1Gbit", "--latency", "5"], "time with its unit"),
        (["quantize", *SMALL, "--dry-run", "--bandwidth", "1Gbit", "--compute", "soon"], "--compute"),
        (["quantize", *SMALL, "--dry-run", "--workers", "100000"], "a global batch is larger"),
        (["federate", "--config", "domo", "--dry-run", "--bandwidth", "1Gbit"], "no prediction of step times"),
        (["bench", "--codec", "nope"], "is not measured"),
        (["bench", "workers=2"], "is for --config"),
        (["bench", "--config", "domo"], "exchanges no gradients"),
        (["bench", "--config", "nope"], "no such file"),
        (["bench", "--processes", "0"], "greater than or equal to 1"),
    ],
)
def test_refused(arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert says in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("recipe", [f"{r.verb}/{r.name}" for v in ("quantize", "sparsify", "pretrain") for r in catalog.listing(v)][::4])
def test_one_worker_foresees_for_all(recipe: str) -> None:
    """A dry run builds one worker of N, and its bits are those of all of them."""
    chosen = load(recipe, None, [], smoke=True).recipe
    everyone, one = forecast(chosen), forecast(chosen, Alone(chosen.seed))
    assert (one.up, one.down, one.steps) == (everyone.up, everyone.down, everyone.steps)


def test_a_thousand_workers_need_no_more_memory() -> None:
    recipe = load("sparsify/def", None, ["workers=1000", "train.batch_size=1"]).recipe
    found = step_time(recipe, Link(1e9, 1e-5), 1e-3)
    assert found["workers"] == 1000 and found["wire_s"] > 999 * 1e-5


def test_break_even_is_where_both_take_as_long() -> None:
    import xutrain

    found = break_even(xutrain.codec("orq", levels=3), 10**6, 4, 2e-3, 1e-3, Link(1e9, 0.0))
    at = found["break_even_bandwidth"]
    there = break_even(xutrain.codec("orq", levels=3), 10**6, 4, 2e-3, 1e-3, Link(at, 0.0))
    if there["exchange"] == found["exchange"]:
        assert there["exchange_s"] == pytest.approx(there["fp32_s"])
    assert break_even(xutrain.codec("fp"), 10**6, 4, 0.0, 0.0, Link())["break_even_bandwidth"] is None
    assert break_even(xutrain.codec("random_block", ratio=64), 10**6, 4, 0.0, 0.0, Link())["break_even_bandwidth"] == math.inf


def test_bench(capfd: pytest.CaptureFixture[str]) -> None:
    found = _json(["bench", "--elements", "20000", "--codec", "orq-3", "--codec", "fp", "--workers", "4"], capfd)
    assert found["network"]["bandwidth"] > 0 and found["network"]["latency_s"] > 0 and found["processes"] == 2
    orq, fp = found["codecs"]
    assert orq["bits_per_element"] == pytest.approx(1.6 + 96 / 2048, rel=0.02) and orq["encode_ns"] > 0 and fp["pays_here"] is False
    assert found["headroom"] >= 1


def test_bench_of_a_recipe_without_a_network(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--config", "orq", "model.hidden=[16]", "--processes", "1", "--codec", "bingrad-b"]) == 0
    text = capfd.readouterr().out
    assert "not measured" in text and "bingrad-b" in text and "headroom" in text
