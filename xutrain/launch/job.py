"""What a job script asks before and after a run: ``python -m xutrain.launch.job begin|end RUN_DIR [CODE]``. Torch-free."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

from xutrain.engine.record import read_json, write_json
from xutrain.launch.run import EXIT_CODES, settle

#: how a STOP file of a job script begins; one that a person made stays
SIGNALLED = "slurm:"


def progress(folder: Path) -> int:
    """How far a run has been saved: the step of its newest checkpoint, or its finished layers."""
    steps = [int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("step-*") if p.name.split("-")[1].isdigit()]
    layers = sum(len(p.read_bytes().splitlines()) for p in folder.rglob("journal.jsonl"))
    return max([layers, *steps])


def clear_stop(folder: Path) -> None:
    """Remove the STOP file that an earlier start obeyed, or that a job script wrote before it was killed."""
    file = folder / "STOP"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return
    if read_json(folder / "state.json").get("status") == "stopped" or text.startswith(SIGNALLED):
        file.unlink(missing_ok=True)


def begin(folder: Path) -> str:
    """Settle a run folder for a start: the saved progress, or ``done``."""
    state = read_json(folder / "state.json")
    if state.get("status") == "done":
        return "done"
    for old in (folder / "logs").glob("fault-*.json"):
        old.unlink()
    clear_stop(folder)
    job = {"id": _job_id(), "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    write_json(folder / "state.json", {**state, "status": "queued", "job": job})
    run = read_json(folder / "run.json")
    start = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "host": platform.node(), "job": job}
    write_json(folder / "run.json", {**run, "job_starts": [*run.get("job_starts", []), start]})
    return str(progress(folder))


def _job_id() -> str:
    """The number by which squeue and scancel know this job, in an array the task's."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def end(folder: Path, code: int) -> tuple[int, int]:
    """Settle state.json after a start; the saved progress and the run's exit code."""
    state = settle(folder, code)
    for line in state.get("error", []):
        print(line, file=sys.stderr)
    return progress(folder), int(state.get("exit_code") or EXIT_CODES.get(state["status"], 1))


def main(arguments: list[str]) -> int:
    if arguments[0] == "begin":
        print(begin(Path(arguments[1])))
        return 0
    saved, code = end(Path(arguments[1]), int(arguments[2]))
    print(saved)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
