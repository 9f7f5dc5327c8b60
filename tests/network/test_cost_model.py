"""The alpha-beta model of collectives, and what ``exchange.mode=auto`` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xutrain
from xutrain.engine.context import Context
from xutrain.engine.meter import BitMeter
from xutrain.engine.network import Link, cheaper, parse_bandwidth, parse_time, rate_text
from xutrain.engine.record import read_metrics
from xutrain.engine.workers import Workers
from xutrain.errors import UsageError
from xutrain.loops.data_parallel import build, forecast
from xutrain.methods.exchange import Exchange, choose
from xutrain.recipe.identity import group_id
from xutrain.recipe.load import from_dict, load

QUANTIZE = {"data": "digits", "model": "mlp", "train": {"steps": 3, "batch_size": 4}, "codec": {"name": "orq", "levels": 3}}


def test_closed_forms() -> None:
    link = Link(1e9, 1e-3)
    assert link.allreduce(8e9, 4) == pytest.approx(2 * 3 * 1e-3 + 2 * 3 / 4 * 8)
    assert link.allgather(1e9, 4) == pytest.approx(3e-3 + 3)
    assert link.alltoall(1e9, 4) == pytest.approx(3e-3 + 0.75)
    assert link.exchange("alltoall", 1e9, 4) == pytest.approx(6e-3 + 1.5)
    assert link.exchange("ps", 1e9, 4, 8e9) == pytest.approx(1e-3 + 3 + 2 * (1e-3 + 8))
    assert all(link.exchange(m, 1e9, 1, 1e9) == 0 for m in ("allreduce", "allgather", "alltoall", "ps"))


def test_all_to_all_wins_where_bytes_outweigh_messages() -> None:
    """The border is (1 - 2/n) payload / B = alpha."""
    for n, alpha in ((4, 1e-3), (16, 1e-4)):
        border = alpha * 1e9 / (1 - 2 / n)
        assert cheaper(Link(1e9, alpha), 0.99 * border, n) == "allgather"
        assert cheaper(Link(1e9, alpha), 1.01 * border, n) == "alltoall"
    assert cheaper(Link(1e9, 0.0), 1e12, 2) == "allgather"


@pytest.mark.parametrize(("text", "value"), [("1Gbit", 1e9), ("100 Mbit/s", 1e8), ("25gbps", 25e9), ("125MByte/s", 1e9), ("9600bit", 9600)])
def test_bandwidth(text: str, value: float) -> None:
    assert parse_bandwidth(text) == value


@pytest.mark.parametrize("text", ["", "1G", "1000", "-1Gbit", "0Mbit", "fast", "1 Gbit 2", "1MB/s", "nanGbit", "1e999Gbit"])
def test_bandwidth_without_a_meaning(text: str) -> None:
    with pytest.raises(UsageError, match="rate"):
        parse_bandwidth(text)


def test_times() -> None:
    assert parse_time("50us") == pytest.approx(5e-5) and parse_time("0s") == 0 and parse_time("1.5 ms") == pytest.approx(1.5e-3)
    for wrong in ("50", "-1ms", "soon", "1e999s"):
        with pytest.raises(UsageError, match="time"):
            parse_time(wrong)
    assert rate_text(2.5e8) == "250 Mbit/s" and rate_text(12) == "12 bit/s"


def test_what_auto_chooses() -> None:
    link = Link(1e8, 1e-5)
    assert choose(xutrain.codec("fp"), 10**6, 8, link) == ("allgather", "ring")
    assert choose(xutrain.codec("random_block", ratio=64), 10**6, 8, link) == ("allgather", "ring")
    assert choose(xutrain.codec("orq"), 10**6, 8, link) == ("alltoall", "exact")
    assert choose(xutrain.codec("orq"), 10**6, 2, link) == ("allgather", "exact")
    assert choose(xutrain.codec("orq"), 10**6, 8, link, again=False) == ("allgather", "exact")
    assert choose(xutrain.codec("orq"), 10**3, 8, Link(1e9, 1e-3)) == ("allgather", "exact")
    assert choose(xutrain.codec("top_k", ratio=64), 10**6, 8, link) == ("allgather", "exact")


def test_auto_in_a_recipe() -> None:
    """The link decides, is part of the identity only then, and dry run and meter follow the choice."""
    slow = {"mode": "auto", "bandwidth": 1e6, "latency": 1e-6}
    recipe = from_dict("quantize", {**QUANTIZE, "workers": 4, "exchange": slow})
    assert build(recipe, Context(0)).exchange.mode == "alltoall"
    assert forecast(recipe).details["exchange"] == "alltoall, exact"
    quick = from_dict("quantize", {**QUANTIZE, "workers": 4, "exchange": {**slow, "latency": 1.0}})
    assert build(quick, Context(0)).exchange.mode == "allgather"
    assert group_id(quick) != group_id(recipe)
    plain, same = (from_dict("quantize", {**QUANTIZE, "exchange": {"bandwidth": b}}) for b in (1e6, 1e9))
    assert group_id(plain) == group_id(same)
    fed = from_dict("quantize", {**QUANTIZE, "workers": 4, "exchange": slow, "method": {"name": "sgd", "error_feedback": True}})
    assert build(fed, Context(0)).exchange.mode == "allgather"


def test_auto_counts_what_it_sends(trained: Callable[..., Path]) -> None:
    """One process and two count and compute the same, and as much as was foreseen."""
    wanted = ["workers=4", "exchange={mode: auto, bandwidth: 1e6, latency: 1e-6}", "train.steps=3", "codec.levels=3"]
    last = []
    for processes in (1, 2):
        lines = read_metrics(trained("quantize/orq", wanted, processes, out=str(processes)))
        last.append([(v["name"], v["value"], v["bits_up"], v["bits_down"]) for v in lines])
    foreseen = forecast(load("quantize/orq", None, wanted).recipe)
    assert last[0] == last[1]
    assert last[0][-1][2:] == (foreseen.up, foreseen.down)


def test_seconds_of_an_exchange() -> None:
    """What an exchange says it costs is the model's formula for the way it goes."""
    link, length = Link(1e8, 1e-4), 10**5

    def of(codec: Any, **how: Any) -> float:
        workers = Workers(4, 0, 1, how.pop("reduction", "exact"))
        return Exchange(workers, codec, BitMeter(), **how).seconds(length, link)

    orq, fp, block = xutrain.codec("orq"), xutrain.codec("fp"), xutrain.codec("random_block", ratio=64)
    payload = orq.payload_bits(length)
    assert of(orq) == link.allgather(payload, 4)
    assert of(orq, mode="alltoall") == link.alltoall(payload, 4) + link.allgather(payload / 4, 4)
    assert of(fp, reduction="ring") == link.allreduce(32 * length, 4)
    assert of(fp) == link.allgather(32 * length, 4)
    assert of(block, reduction="ring") == link.allreduce(block.payload_bits(length), 4)
    assert of(orq, mode="ps") == link.gather(payload, 4) + link.broadcast(32 * length, 4)
    assert torch.get_num_threads() == 1
