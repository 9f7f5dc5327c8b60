"""Requests to stop: the file, the signal, and children that only inherited the handler."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

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


def test_a_forked_child_ends_on_term(tmp_path: Path) -> None:
    stop = Stop(tmp_path, Context())
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    time.sleep(0.1)
    child.terminate()
    child.join(5)
    assert child.exitcode == -signal.SIGTERM
    assert not stop.requested(0)
