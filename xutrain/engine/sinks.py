"""Who is told of a run's values while it runs: the console, Weights & Biases, TensorBoard. None of them feeds anything back."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from xutrain.recipe.schema import Log


class Sink:
    """Hears everything that a record is told. Every part is optional."""

    def values(self, step: int, values: dict[str, Any]) -> None:
        """New values at a step."""

    def progress(self, step: int, total: int, unit: str, shown: dict[str, float]) -> None:
        """How far the run is."""

    def note(self, text: str) -> None:
        """A remark that readers must see."""

    def close(self) -> None:
        """The run is over."""


class Console(Sink):
    """A live bar on a terminal; elsewhere a plain line every 30 seconds or tenth of the run. Always on stderr."""

    def __init__(self, title: str, verbosity: int = 0) -> None:
        self.title, self.verbosity = title, verbosity
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()
        self._tenth = 0
        self._live = sys.stderr.isatty() and verbosity >= 0 and "CI" not in os.environ

    def progress(self, step: int, total: int, unit: str, shown: dict[str, float]) -> None:
        if self.verbosity < 0:
            return
        text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        if self._live:
            self._show(step, total, unit, text)
            return
        tenth = 10 * step // max(1, total)
        if tenth > self._tenth or time.monotonic() - self._last > 30:
            self._tenth, self._last = tenth, time.monotonic()
            print(f"{self.title}: {unit} {step}/{total}  {text}", file=sys.stderr, flush=True)

    def _show(self, step: int, total: int, unit: str, text: str) -> None:
        if self._bar is None:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=RichConsole(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=total, text="")
        self._bar.update(self._task, completed=step, total=total, text=text)

    def note(self, text: str) -> None:
        if self.verbosity >= 0:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Wandb(Sink):
    """Weights & Biases. A login or network failure becomes a note; the record on disk has everything."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], log: Log, group: str, identity: str | None = None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run: Any = None
        self.failure = ""
        try:
            settings = wandb.Settings(init_timeout=30)
            self._run = wandb.init(
                project=log.project, name=name, group=group, config=config, dir=str(folder), mode=log.wandb, settings=settings,
                id=identity, resume=None if identity is None else "allow",
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            self.failure = str(error).splitlines()[0]

    def values(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({"step": step, **values})

    def summary(self, values: dict[str, Any]) -> None:
        """The final numbers of a run."""
        if self._run is not None:
            self._run.summary.update(values)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class TensorBoard(Sink):
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
        #: when the values came, seconds since 1970; None: now
        self.clock: float | None = None

    def values(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and name not in ("epoch", "round"):
                self._writer.add_scalar(name, value, step, self.clock)

    def close(self) -> None:
        self._writer.close()


def open_sinks(folder: Path, title: str, config: dict[str, Any], log: Log, group: str, verbosity: int) -> tuple[list[Sink], list[str]]:
    """The sinks that a recipe asks for, and notes about those that could not be opened."""
    sinks: list[Sink] = [Console(title, verbosity)]
    notes = []
    if log.wandb != "disabled":
        sink = Wandb(folder, title, config, log, group)
        sinks.append(sink)
        if sink.failure:
            notes.append(f"Weights & Biases is not recording this run: {sink.failure}")
    if log.tensorboard:
        try:
            sinks.append(TensorBoard(folder))
        except ImportError:
            notes.append("TensorBoard is not installed: pip install 'xutrain[tensorboard]'")
    return sinks, notes
