"""Stopping on request, agreed by all processes, at a step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from xutrain.engine.context import Context

_NEVER = 2**62
_CHECK_EVERY = 10  # most steps between agreements where there are several processes
_CHECK_S = 1.0  # and about the most seconds: with steps of minutes, every step


class Stop:
    """Hears TERM, INT, USR2 and a file STOP in the run folder.

    A STOP file that holds a number asks to stop after that many steps (rounds); an empty one, at the next boundary.
    """

    def __init__(self, folder: Path, ctx: Context, every: int = _CHECK_EVERY) -> None:
        self.file = folder / "STOP"
        self._workers = ctx.workers(ctx.processes)
        self._signalled = False
        self._process = os.getpid()
        self._interrupts = 0
        self._every = every
        self._left = 0  # steps to the next agreement
        self._met = time.monotonic()
        self._gap = 1
        self._at = _NEVER
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child (a pool, a data loader) inherits the handler but is no run: it just ends
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signalled = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def requested(self, step: int) -> bool:
        """Whether to save and stop now that ``step`` steps are done; the same answer on every process."""
        if self._workers.processes == 1:
            return step >= self._wish(step)
        if self._left == 0:
            now = time.monotonic()
            fits = int(_CHECK_S * self._gap / max(now - self._met, 1e-6))
            self._at, self._gap = self._workers.least(self._wish(step), min(max(fits, 1), self._every))
            self._met, self._left = now, self._gap
        self._left -= 1
        return step >= self._at

    def _wish(self, step: int) -> int:
        if self._signalled:
            return step
        try:
            text = self.file.read_text(encoding="utf-8").strip()
        except OSError:
            return _NEVER
        return int(text) if text.isdigit() else step
