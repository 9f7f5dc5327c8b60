"""What really leaves a process: bytes of the loopback interface of a network namespace of its own, against the meter."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xutrain.engine.context import Context
from xutrain.methods.exchange import Exchange
from xutrain.recipe.resolve import options

CLONE_NEWNET = 0x40000000
ROUNDS = 20
LENGTH = 200_000

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2 for a network namespace")


def _sent_on_loopback() -> int:
    line = next(x for x in Path("/proc/self/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def _rank(codec: str, chosen: dict[str, Any], mode: str) -> tuple[int, int]:
    """Bytes that the interface counted during the exchanges, and bits that the meter did."""
    ctx = Context.open(seed=1)
    workers = ctx.workers(2)
    cls, given = options("codec", codec, chosen)
    exchange = Exchange(workers, cls(given, workers=2), ctx.meter, mode)  # type: ignore[arg-type]
    vectors = [torch.randn(LENGTH, generator=ctx.key("v", worker=w).generator()) for w in workers.hosted]
    exchange.mean([v.clone() for v in vectors], ctx.key("warm"))
    workers.barrier()
    before, up, down = _sent_on_loopback(), ctx.meter.up, ctx.meter.down
    for step in range(ROUNDS):
        exchange.mean([v.clone() for v in vectors], ctx.key("round", step))
    workers.barrier()
    up, down = ctx.meter.up - up, ctx.meter.down - down
    # the server is worker 0's process here, so one worker's share of both ways stays in memory
    return _sent_on_loopback() - before, (up + down) // 2 if mode == "ps" else down


def _in_namespace(forked: Callable[..., list[Any]], codec: str, chosen: dict[str, Any], mode: str) -> list[Any]:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        return ["no namespace"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return forked(_rank, 2, codec, chosen, mode)


@pytest.mark.parametrize(
    ("codec", "chosen", "mode"),
    [("fp", {}, "allgather"), ("orq", {"levels": 3}, "allgather"), ("bingrad_b", {}, "alltoall"), ("orq", {"levels": 9}, "ps")],
)
def test_interface_agrees_with_the_meter(forked: Callable[..., list[Any]], codec: str, chosen: dict[str, Any], mode: str) -> None:
    import multiprocessing

    # a pool's worker is a daemon and may not fork; a plain process of its own keeps this one's network as it is
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(_in_namespace(forked, codec, chosen, mode)))
    child.start()
    assert receiver.poll(60), "no answer from the namespace"
    answers = receiver.recv()
    child.join(10)
    if answers == ["no namespace"]:
        pytest.skip("network namespaces are not allowed here")
    wire, counted = answers[0][0], answers[0][1] / 8
    assert counted <= wire <= 1.05 * counted + ROUNDS * 4000  # headers of packets and gloo's own words
