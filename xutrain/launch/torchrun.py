"""Start the processes of a run through torch.distributed.run, watch them, and leave none behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from xutrain.errors import Issue, UsageError

if sys.platform != "win32":
    import fcntl

_FAILURE = re.compile(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)")
_ENDED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


def command(folder: Path, nproc: int) -> list[str]:
    """The torchrun line of a single-node run."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m", "xutrain.worker", str(folder)]


@contextlib.contextmanager
def processes_lock(folder: Path, patience_s: float = 90) -> Iterator[int]:
    """The lock that torchrun holds for as long as its processes live, as a descriptor to hand on.

    The processes of a launcher that was killed save and end by themselves; a new start waits for that.

    Raises:
        UsageError: they are still there after ``patience_s`` seconds.
    """
    descriptor = os.open(folder / ".lock.processes", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told, end = False, time.monotonic() + patience_s
        while sys.platform != "win32":
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    hint = f"stop them with `xutrain runs stop {folder}`, or end them by hand"
                    what = "is still being run by the processes of an earlier launcher"
                    raise UsageError(Issue(str(folder), what, has_value=False, hint=hint)) from None
            if not told:
                told = True
                print("note: processes of an earlier launcher still save this run; waiting for them", file=sys.stderr, flush=True)
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def run_processes(folder: Path, nproc: int, verbosity: int = 0, lock: int | None = None) -> int:
    """Run ``nproc`` processes on this machine; returns torchrun's exit code (130 when interrupted twice).

    The first INT or TERM becomes the STOP file, so that all ranks save at one step boundary; a second INT ends them.
    ``lock`` is the descriptor of a lock that torchrun keeps.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "first-failure.json").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with subprocess.Popen(
        command(folder, nproc),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        pass_fds=() if lock is None else (lock,),
        preexec_fn=partial(die_with_parent, os.getpid()),
    ) as process:
        relay = threading.Thread(target=_relay, args=(process.stdout, logs / "torchrun.log", verbosity), daemon=True)
        relay.start()
        interrupts = 0

        def hear(number: int, frame: object) -> None:
            nonlocal interrupts
            interrupts += 1
            (folder / "STOP").touch()
            if interrupts > 1:
                os.killpg(process.pid, signal.SIGKILL)

        in_main = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, hear) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)} if in_main else {}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        relay.join(timeout=10)
    if code:
        _note_first_failure(logs)
    return 130 if interrupts > 1 else code


def _relay(stream: IO[str] | None, log: Path, verbosity: int) -> None:
    """Keep everything that the processes print; show what is meant for people."""
    if stream is None:
        return
    with log.open("a", encoding="utf-8") as kept:
        for line in stream:
            kept.write(line)
            kept.flush()
            if verbosity > 0 or line.startswith(("note: ", "error: ", "hint: ")) or re.match(r"\w+/\S+ seed \d+: ", line):
                print(line, end="", file=sys.stderr, flush=True)


def _note_first_failure(logs: Path) -> None:
    text = (logs / "torchrun.log").read_text(encoding="utf-8", errors="replace")
    root = _FAILURE.findall(text.rsplit("Root Cause", 1)[-1]) if "Root Cause" in text else []
    ended = _ENDED.findall(text)
    found = (int(root[-1][0]), int(root[-1][1])) if root else (int(ended[0][1]), int(ended[0][0])) if ended else None
    if found:
        (logs / "first-failure.json").write_text(json.dumps({"rank": found[0], "exitcode": found[1]}), encoding="utf-8")


def die_with_parent(parent: int | None = None) -> None:
    """Runs in the child before torchrun starts: Linux ends it when the launcher (process ``parent``) dies, or has died just now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
