"""The run folder: what ran and what came out, written as it happens. Reports and plots read it; training only appends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xutrain.engine.meter import BitMeter
from xutrain.engine.sinks import Sink
from xutrain.errors import Failed, Issue


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader never sees half of it. An OSError names the file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where the file is missing or torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Record:
    """Appends to a run folder. Only the first process writes; the others may call everything.

    Attributes:
        folder: the run folder.
    """

    def __init__(self, folder: Path, meter: BitMeter, *, seed: int = 0, is_main: bool = True, sinks: list[Sink] | None = None) -> None:
        self.folder = folder
        self.is_main = is_main
        self._meter = meter
        self._seed = seed
        self._sinks = sinks or []
        self._metrics = folder / "metrics.jsonl"
        self._started = time.monotonic()
        self._earlier_s = 0.0
        self._file: Any = None
        self._noted: set[str] = set()

    @property
    def wall_s(self) -> float:
        """Seconds of this run so far, earlier starts that it resumed from included."""
        return self._earlier_s + time.monotonic() - self._started

    def log(
        self,
        step: int,
        values: dict[str, float],
        *,
        split: str | None = None,
        epoch: float | None = None,
        round: int | None = None,
        **tags: str | int | float,
    ) -> None:
        """Append one line a value: step, split, name, value, bits so far, seconds so far.

        ``split`` defaults to the first word of the name where that is train, val or test. ``tags`` (client, stage, point)
        are written beside the value.
        """
        if not self.is_main:
            return
        where = {"round": round, "epoch": epoch, **tags}
        lines = []
        for name, value in values.items():
            number = float(value)
            line = {
                "step": step,
                **{k: v for k, v in where.items() if v is not None},
                "split": split or _split_of(name),
                "name": name,
                "value": number if math.isfinite(number) else None,
                "bits_up": self._meter.up,
                "bits_down": self._meter.down,
                "wall_s": round_to_ms(self.wall_s),
                "seed": self._seed,
            }
            lines.append(json.dumps(line) + "\n")
        self._append("".join(lines))
        for sink in self._sinks:
            sink.values(step, {**{f"{k}": v for k, v in where.items() if v is not None}, **values})

    def _append(self, text: str) -> None:
        """Raises Failed where the disk refuses; the half line that it may leave is passed over by readers."""
        try:
            if self._file is None:
                self._file = self._metrics.open("ab", buffering=0)
            rest = memoryview(text.encode())
            while rest:  # a disk that fills up takes a part first
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            hint = "free some space; the checkpoints are whole, and the same command goes on from the last"
            raise Failed(Issue(str(self._metrics), f"could not be written: {error.strerror}", has_value=False, hint=hint)) from None

    def progress(self, step: int, total: int, unit: str = "step", **shown: float) -> None:
        """Say how far the run is; sinks decide whether to show it."""
        if self.is_main:
            for sink in self._sinks:
                sink.progress(step, total, unit, shown)

    def note(self, text: str) -> None:
        """Keep a remark that a reader of the result must see, in run.json once, and show it once in every start of the run."""
        if not self.is_main:
            return
        run = read_json(self.folder / "run.json")
        notes = run.setdefault("notes", [])
        if text not in notes:
            notes.append(text)
            write_json(self.folder / "run.json", run)
        if text not in self._noted:  # a second resumption from the same step says so again
            self._noted.add(text)
            for sink in self._sinks:
                sink.note(text)

    def artefact(self, name: str) -> Path:
        """Where a picture or a table of this run goes; its folder exists."""
        path = self.folder / "artefacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return list(read_metrics(self.folder))

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, which a resumed run writes again, and go on with the clock of the last one kept."""
        if not self.is_main or not self._metrics.exists():
            return
        kept = [line for line in read_metrics(self.folder) if line["step"] <= step]
        self._rewrite(kept)
        self._earlier_s = max((line["wall_s"] for line in kept), default=0.0)
        self._started = time.monotonic()

    def forget(self, *names: str) -> None:
        """Drop the lines of these names, which a start before this one wrote and this one writes again."""
        if self.is_main and self._metrics.exists():
            self._rewrite([line for line in read_metrics(self.folder) if line["name"] not in names])

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        aside = self._metrics.with_suffix(".aside")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(aside, self._metrics)

    def state(self, status: str, **more: Any) -> None:
        """Write state.json: queued, running, done, stopped, failed or diverged, and what goes with it."""
        if self.is_main:
            known = {k: v for k, v in read_json(self.folder / "state.json").items() if k in ("step", "steps", "checkpoint", "job")}
            write_json(self.folder / "state.json", {**known, "status": status, **more, "updated": time.time()})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for sink in self._sinks:
            sink.close()

    def seal(self) -> str:
        """SHA-256 of metrics.jsonl, which state.json keeps so that a later change is noticed."""
        return metrics_digest(self.folder)


def metrics_digest(folder: Path) -> str:
    path = folder / "metrics.jsonl"
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()


def result_digest(result: dict[str, Any]) -> str:
    """SHA-256 of a result's numbers, which state.json keeps beside them."""
    kept = {key: result.get(key) for key in ("metrics", "bits", "seed")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


#: what every line of metrics.jsonl has
_LINE = {"step", "split", "name", "value", "bits_up", "bits_down", "wall_s", "seed"}


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line that a kill tore, or that no record wrote, is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and value.keys() >= _LINE and isinstance(value["step"], int):
                yield value


def round_to_ms(seconds: float) -> float:
    return float(f"{seconds:.3f}")


def _split_of(name: str) -> str:
    first = name.split("_")[0]
    return first if first in ("train", "val", "test") else "run"
