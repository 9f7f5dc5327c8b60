"""Requests to stop: the file, the signal, and children that only inherited the handler."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xutrain.engine import stop as stopping
from xutrain.engine.context import Context
from xutrain.engine.stop import Stop


def test_file(tmp_path: Path) -> None:
    stop = Stop(tmp_path, Context())
    assert not stop.requested(0)
    stop.file.write_text("3\n")
    assert [stop.requested(s) for s in (1, 2, 3, 4)] == [False, False, True, True]
    stop.file.write_text("")
    assert stop.requested(1)


def test_signal(tmp_path: Path) -> None:
    stop = Stop(tmp_path, Context())
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.requested(5)


def _wait(runs: Any) -> None:
    runs.set()
    time.sleep(100)


def test_a_forked_child_ends_on_term(tmp_path: Path) -> None:
    stop = Stop(tmp_path, Context())
    context = multiprocessing.get_context("fork")
    runs = context.Event()
    child = context.Process(target=_wait, args=(runs,), daemon=True)
    child.start()
    assert runs.wait(50)  # a signal that comes before the child's own Python runs is lost
    child.terminate()
    child.join(50)
    assert child.exitcode == -signal.SIGTERM
    assert not stop.requested(0)


def _slow_and_quick_steps(folder: Path) -> tuple[int, int, int]:
    """Steps of a third of the interval: how many go by after the file. Quick steps: how many agreements 200 of them take.

    Each process has a clock that only its steps move, so that the answer does not depend on how busy the machine is.
    """
    ctx = Context.open()
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    stopping.time = clock  # type: ignore[attr-defined]
    stop = Stop(folder, ctx)
    agreements = []
    plain = stop._workers.least
    stop._workers.least = lambda *values: agreements.append(values) or plain(*values)  # type: ignore[method-assign, func-returns-value]
    for step in range(200):
        clock.now += 0.001
        assert not stop.requested(step)
    quick = len(agreements)
    for step in range(200, 211):  # the agreement that was made in quick times may be ten steps away
        clock.now += 0.3
        assert not stop.requested(step)
    ctx.workers(ctx.processes).barrier()
    if ctx.is_main:
        (folder / "STOP").touch()
    ctx.workers(ctx.processes).barrier()
    for step in range(211, 231):
        clock.now += 0.3
        if stop.requested(step):
            break
    return quick, step - 211, step


def test_processes_agree_within_a_second(tmp_path: Path, forked: Callable[..., list[Any]]) -> None:
    (quick, late, at), other = forked(_slow_and_quick_steps, 2, tmp_path)
    assert quick <= 25 and late <= 3, "slow steps are asked one by one, quick ones ten at a time"
    assert other[2] == at, "on the same step"
