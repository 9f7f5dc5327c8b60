"""Who stopped first: every process leaves its iteration on disk, and a fault that follows from another's names that one.

`logs/pulse-<rank>` holds the iteration that a process is in, so that even a killed one has told it. A process that loses
a peer looks for the first fault of the others and reports that, with its own place.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from xutrain.engine.pipes import PeerLost
from xutrain.engine.record import read_json
from xutrain.errors import Failed, Issue, XutrainError

_LOST = ("Connection", "connection", "closed by peer", "reset by peer", "Broken pipe", "timeout", "Timed out", "NCCL")
_PLACE = re.compile(
    r"stages? [\d-]+ \(rank (?P<rank>\d+)\), iteration (?P<iteration>\d+): (?P<text>.*?)(; stage \d+ \(rank \d+\) waited .*)?$"
)


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
        self.started = time.time()
        self.iteration = 0
        self._file = os.open(self._path(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644) if processes > 1 else -1
        self.beat(0)

    def _path(self, rank: int) -> Path:
        return self.logs / f"pulse-{rank}"

    def beat(self, iteration: int) -> None:
        """This process begins ``iteration``."""
        self.iteration = iteration
        if self._file >= 0:
            os.pwrite(self._file, b"%12d" % iteration, 0)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(value, Exception) or isinstance(value, XutrainError):
            self.close()
            return  # after a fault the pulse stays open, so that others see who still lives
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
        """(rank, iteration, text) of the first process that stopped; waits a moment for it to write its reason."""
        deadline = time.monotonic() + 1.0
        found = sorted(self._faults())
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            found = sorted(self._faults())
        dead = [] if found else [r for r in range(self.processes) if r != self.rank and not self._alive(r)]
        found = found or sorted(self._faults())  # one that ended meanwhile had written its reason before
        if found:
            _, rank, text = found[0]
            told = _PLACE.match(text)  # the fault of one that lost a peer itself: go on to that peer
            if told:
                return int(told["rank"]), int(told["iteration"]), told["text"]
            return rank, self._iteration_of(rank), text
        if not dead:
            return None
        first = peer if peer in dead else min(dead, key=lambda r: self._path(r).stat().st_mtime)
        return first, self._iteration_of(first), "the process ended without a word (killed?)"

    def _faults(self) -> Iterator[tuple[float, int, str]]:
        for rank in range(self.processes):
            fault = read_json(self.logs / f"fault-{rank}.json")
            if rank != self.rank and float(fault.get("time", 0)) >= self.started:
                lines = [str(line).removeprefix("error: ") for line in fault.get("error", [])]
                yield float(fault["time"]), rank, lines[0] if lines else "failed"

    def _iteration_of(self, rank: int) -> int:
        try:
            return int(self._path(rank).read_bytes() or b"0")
        except (OSError, ValueError):
            return 0

    def _alive(self, rank: int) -> bool:
        """Whether the process that opened a pulse still holds it (same machine only; elsewhere assume so)."""
        path = self._path(rank).resolve()
        for fd in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if Path(os.readlink(fd)) == path:
                    return True
            except OSError:
                continue
        return False
