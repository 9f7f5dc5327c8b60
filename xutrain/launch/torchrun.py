"""Start the processes of a run through torch.distributed.run, watch them, and leave none behind."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

_FAILURE = re.compile(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)")
_ENDED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


def command(folder: Path, nproc: int) -> list[str]:
    """The torchrun line of a single-node run."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m", "xutrain.worker", str(folder)]


def run_processes(folder: Path, nproc: int, verbosity: int = 0) -> int:
    """Run ``nproc`` processes on this machine; returns torchrun's exit code (130 when interrupted twice).

    The first INT or TERM becomes the STOP file, so that all ranks save at one step boundary; a second INT ends them.
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
        preexec_fn=die_with_parent,
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


def die_with_parent() -> None:
    """Runs in the child before torchrun starts: Linux ends it when the launcher dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
