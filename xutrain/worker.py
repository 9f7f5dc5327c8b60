"""The entry of every process: a run folder in, a trained model and a record out."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from xutrain.engine.context import Context
from xutrain.engine.record import Record, metrics_digest, read_json, result_digest, write_json
from xutrain.engine.sinks import open_sinks
from xutrain.errors import Diverged, Stopped, XutrainError
from xutrain.families import FAMILIES
from xutrain.launch.plan import bits_summary
from xutrain.methods.codecs.base import NonFinite
from xutrain.recipe import load, yamlfile
from xutrain.recipe.schema import Recipe


def open_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder, validated again."""
    raw, _ = yamlfile.read(folder / "recipe.yaml")
    return load.build(FAMILIES[str(raw["verb"])], raw)


def execute(folder: Path, timeout_s: float = 600) -> int:
    """Run what a run folder describes, in this process and its peers; returns the exit code.

    The state file tells the rest: status, error, result. A fault of one process is written to logs/fault-<rank>.json,
    from which the launcher learns what ended the others.
    """
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    run = read_json(folder / "run.json")
    rank = int(os.environ.get("RANK", "0"))
    record: Record | None = None
    try:
        recipe = open_recipe(folder)
        with Context.open(recipe.seed, deterministic=recipe.deterministic, threads=recipe.threads, timeout_s=timeout_s) as ctx:
            title = f"{recipe.verb}/{run.get('recipe', '')} seed {recipe.seed}"
            config = recipe.model_dump(mode="json")
            sinks, notes = (
                open_sinks(folder, title, config, recipe.log, str(run.get("group", "")), int(run.get("verbosity", 0)))
                if ctx.is_main
                else ([], [])
            )
            record = Record(folder, ctx.meter, seed=recipe.seed, is_main=ctx.is_main, sinks=sinks)
            for text in [*notes, *_elastic(run)]:
                record.note(text)
            record.state("running", pid=os.getpid(), started=time.time())
            loop = importlib.import_module(FAMILIES[recipe.verb].loop)
            metrics = loop.run(recipe, ctx, record)
            record.close()
            _finish(folder, run, recipe, ctx, record, metrics)
        return 0
    except Stopped as reason:
        return _fault(folder, record, rank, reason, "stopped")
    except (Diverged, NonFinite) as reason:
        return _fault(folder, record, rank, reason, "diverged")
    except XutrainError as reason:
        return _fault(folder, record, rank, reason, "failed")
    except KeyboardInterrupt:
        if record is not None:
            record.state("failed", error=["interrupted"], exit_code=130)
        return 130
    finally:
        if record is not None:
            record.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _elastic(run: dict[str, Any]) -> list[str]:
    """What to say where the start before this one had another number of processes."""
    before, now = run.get("nproc_before"), run.get("nproc")
    if before in (None, now):
        return []
    count = f"{now} process{'es' if now != 1 else ''}"
    return [
        f"goes on with {count} after {before}: states belong to the {run.get('participants')} participants, which were dealt anew; "
        "sums in the participants' order give the same bytes, ring sums the same up to rounding"
    ]


def _finish(folder: Path, run: dict[str, Any], recipe: Recipe, ctx: Context, record: Record, metrics: dict[str, float]) -> None:
    """Write the result: what the command line prints and what a report reads."""
    if not ctx.is_main:
        return
    steps = max((line["step"] for line in record.read()), default=0)
    result = {
        **{key: run.get(key) for key in ("run", "recipe", "verb", "method", "codec", "seed")},
        "run": str(folder),
        "status": "done",
        "scale": recipe.scale,
        "metrics": {name: value if _finite(value) else None for name, value in metrics.items()},
        "bits": bits_summary(ctx.meter.up, ctx.meter.down, recipe.participants, steps),
        "wall_s": round(record.wall_s, 3),
    }
    record.state("done", exit_code=0, result=result, step=steps, metrics_sha256=metrics_digest(folder), result_sha256=result_digest(result))


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _fault(folder: Path, record: Record | None, rank: int, reason: XutrainError, status: str) -> int:
    """Write down why this process ends, where the launcher and a reader look."""
    issues = [issue.as_dict() for issue in reason.issues]
    text = [line for issue in reason.issues for line in issue.lines()]
    fault = {"rank": rank, "status": status, "exit_code": reason.exit_code, "error": text, "issues": issues, "time": time.time()}
    if status != "stopped":
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_json(folder / "logs" / f"fault-{rank}.json", fault)
    if record is not None and record.is_main:
        record.state(status, exit_code=reason.exit_code, error=text)
    elif rank == 0:
        write_json(folder / "state.json", {"status": status, "exit_code": reason.exit_code, "error": text, "updated": time.time()})
    return reason.exit_code


def _die_with_parent() -> None:
    """Ask Linux to end this process when torchrun dies, so that no orphan goes on; at once where torchrun died while we started."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        with contextlib.suppress(OSError):
            if "TORCHELASTIC_RUN_ID" in os.environ and b"torch" not in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
                os._exit(1)


def main() -> None:
    """``python -m xutrain.worker RUN_DIR``, as torchrun starts it."""
    folder = Path(sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        _die_with_parent()
    try:
        code = execute(folder, timeout_s=float(os.environ.get("XUTRAIN_TIMEOUT_S", "600")))
    except Exception as error:
        rank = int(os.environ.get("RANK", "0"))
        fault = {
            "rank": rank,
            "status": "failed",
            "exit_code": 1,
            "error": [f"error: rank {rank}: {type(error).__name__}: {error}"],
            "time": time.time(),
        }
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "logs" / f"fault-{rank}.json").write_text(json.dumps(fault), encoding="utf-8")
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # A request to stop is a clean end for torchrun; peers of a faulty process must not be waited for at interpreter exit.
    os._exit(0 if code in (0, 75) else code)


if __name__ == "__main__":
    main()
