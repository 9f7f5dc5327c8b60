"""Who stopped first: every process leaves its iteration on disk, and a fault that follows from another's names that one.

`logs/pulse-<rank>` holds the iteration that a process is in, so that even a killed one has told it, and is locked for as long as
the process lives. A process that loses a peer looks for the first fault of the others and reports that, with its own place.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from xutrain.engine.pipes import PeerLost
from xutrain.engine.record import read_json
from xutrain.errors import Failed, Issue, XutrainError

if sys.platform != "win32":
    import fcntl

_LOST = ("Connection", "connection", "closed by peer", "reset by peer", "Broken pipe", "timeout", "Timed out", "NCCL")
_PLACE = re.compile(
    r"stages? [\d-]+ \(rank (?P<rank>\d+)\), iteration (?P<iteration>\d+): (?P<text>.*?)(; stage \d+ \(rank \d+\) waited .*)?$",
    re.DOTALL,
)
_PATIENCE_S = 10.0  # for a lost peer to write its reason, or to be gone


class Pulse:
    """The heartbeat of one process of a pipeline, and the reader of the others'.

    Args:
        folder: the run folder.
        rank, processes: this process and how many there are.
        each: stages per process.
    """

    def __init__(self, folder: Path, rank: int, processes: int, each: int) -> None:
        self.logs, self.rank, self.processes, self.each = folder / "logs", rank, processes, each
        self.logs.mkdir(parents=True, exist_ok=True)
        self.iteration = 0
        self._file, self._locked = -1, False
        if processes > 1:
            self._file = os.open(self._path(rank), os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_SH)
                self._locked = True
        self.beat(0)

    def _path(self, rank: int) -> Path:
        return self.logs / f"pulse-{rank}"

    def beat(self, iteration: int) -> None:
        """This process begins ``iteration``."""
        self.iteration = iteration
        if self._file >= 0:
            os.pwrite(self._file, b"%12d" % iteration, 0)

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if value is None and self._file >= 0:
            os.close(self._file)  # after a fault it is held to the end of the process: whoever lets go has written why before
        if not isinstance(value, Exception) or isinstance(value, XutrainError):
            return
        if isinstance(value, PeerLost) or (
            self.processes > 1 and isinstance(value, RuntimeError) and any(word in str(value) for word in _LOST)
        ):
            raise self.lost(value) from value
        path = self.logs / f"trace-{self.rank}.txt"
        path.write_text("".join(traceback.format_exception(kind, value, trace)), encoding="utf-8")
        raise Failed(
            Issue(
                self.place(self.rank, self.iteration),
                f"{type(value).__name__}: {value}",
                has_value=False,
                hint=f"the stack trace is in {path}",
            )
        ) from value

    def place(self, rank: int, iteration: int) -> str:
        """How messages name a process and its iteration."""
        first = rank * self.each
        stages = f"stage {first}" if self.each == 1 else f"stages {first}-{first + self.each - 1}"
        return f"{stages} (rank {rank}), iteration {iteration}"

    def lost(self, reason: BaseException) -> Failed:
        """The fault of this process that follows from another's."""
        what = f"waited for {reason.what}" if isinstance(reason, PeerLost) else "waited for the other stages"
        cause = self._cause(reason.peer if isinstance(reason, PeerLost) else None)
        if cause is None:
            return Failed(Issue(self.place(self.rank, self.iteration), f"{what}: {reason}", has_value=False))
        rank, iteration, text = cause
        message = f"{text}; stage {self.rank * self.each} (rank {self.rank}) {what} in iteration {self.iteration}"
        return Failed(
            Issue(self.place(rank, iteration), message, has_value=False, hint="the same command goes on from the last checkpoint")
        )

    def _cause(self, peer: int | None) -> tuple[int, int, str] | None:
        """(rank, iteration, text) of the first process that stopped; None if all seem well for a while."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            dead = self._dead()
            faults = sorted(self._faults())  # read after looking who is gone: a process that ends of a fault has written it before
            if faults:
                _, rank, text = faults[0]
                told = _PLACE.match(text)  # the fault of one that lost a peer itself: go on to that peer
                if told:
                    return int(told["rank"]), int(told["iteration"]), told["text"]
                return rank, self._iteration_of(rank), text
            if dead:
                first = peer if peer in dead else min(dead, key=lambda r: _changed(self._path(r)) or float("inf"))
                return first, self._iteration_of(first), "the process ended without a word (killed?)"
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)

    def _faults(self) -> Iterator[tuple[float, int, str]]:
        """(time, rank, first line) of the other processes' faults since they opened their pulse."""
        for rank in range(self.processes):
            path = self.logs / f"fault-{rank}.json"
            fault = read_json(path)
            if rank != self.rank and fault and _changed(path) >= _changed(self._path(rank)):
                lines = [str(line).removeprefix("error: ") for line in fault.get("error", [])]
                yield float(fault.get("time", 0)), rank, lines[0] if lines else "failed"

    def _iteration_of(self, rank: int) -> int:
        try:
            return int(self._path(rank).read_bytes() or b"0")
        except (OSError, ValueError):
            return 0

    def _dead(self) -> list[int]:
        """The other processes of this machine that do not hold their pulse. Of other machines nothing is known."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", self.rank))
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", self.processes)))
        return [r for r in here if r != self.rank and self._gone(r)] if self._locked else []

    def _gone(self, rank: int) -> bool:
        """Whether nobody holds a pulse: the system lets go of a lock when a process ends, however it ends."""
        try:
            with self._path(rank).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True  # it ended before it began
        except OSError:
            return False  # held
        return True


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
