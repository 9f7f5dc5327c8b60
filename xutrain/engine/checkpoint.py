"""Checkpoints that are whole or absent: written aside, synced, renamed, with checksums; loaded as weights only.

A checkpoint belongs to logical workers, not to processes, so a run may go on with another number of processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.errors import Failed, Issue, XutrainError
from xutrain.recipe.schema import Checkpoint

_MANIFEST = "manifest.json"


class CheckpointError(XutrainError):
    """A checkpoint that must not be loaded (exit code 3)."""

    exit_code = 3


class Saved:
    """A checkpoint on disk.

    Attributes:
        step: the step after which it was taken.
        shared: state that all processes share.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self._device = device
        self.step = int(read_manifest(folder)["step"])
        self.shared: dict[str, Any] = self._load("shared.pt")

    @property
    def workers(self) -> list[int]:
        """The logical workers whose state is here."""
        return sorted(int(f.stem.split("-")[1]) for f in self.folder.glob("worker-*.pt"))

    def worker(self, worker: int) -> dict[str, Any]:
        """The state of one logical worker."""
        return self._load(f"worker-{worker:04d}.pt")

    def model(self) -> dict[str, Tensor]:
        """The tensors that were to be evaluated at this step."""
        return load_file(self.folder / "model.safetensors", device=str(self._device))

    def _load(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = torch.load(path, map_location=self._device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                Issue(str(path), f"cannot be loaded as plain weights: {reason}", has_value=False, hint="use --fresh to start anew")
            ) from None
        assert isinstance(value, dict)
        return value


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, options: Checkpoint, ctx: Context, note: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder / "checkpoints"
        self.options = options
        self.ctx = ctx
        self._workers = ctx.workers(ctx.processes)
        self._note = note

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint after ``step`` steps."""
        return self.options.every is not None and step % self.options.every == 0

    def save(
        self, step: int, *, shared: dict[str, Any], workers: dict[int, dict[str, Any]] | None = None, model: dict[str, Tensor] | None = None
    ) -> Path:
        """Write the checkpoint of ``step``; each process brings the workers that it hosts, the first one the rest.

        Raises:
            Failed: the disk refused; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:06d}"
        aside = self.folder / f".step-{step:06d}.aside"
        problem = ""
        if self.ctx.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            problem = _attempt(lambda: aside.mkdir(parents=True))
        self._agree(problem)
        problem = _attempt(lambda: self._write(aside, shared, workers or {}, model))
        self._agree(problem)
        if self.ctx.is_main:
            problem = _attempt(lambda: self._publish(aside, final, step))
        self._agree(problem)
        return final

    def _write(self, aside: Path, shared: dict[str, Any], workers: dict[int, dict[str, Any]], model: dict[str, Tensor] | None) -> None:
        for worker, state in workers.items():
            _save(aside / f"worker-{worker:04d}.pt", state)
        if self.ctx.is_main:
            _save(aside / "shared.pt", shared)
            if model is not None:
                save_file({n: t.detach().cpu().contiguous().clone() for n, t in model.items()}, aside / "model.safetensors")
                _sync(aside / "model.safetensors")

    def _publish(self, aside: Path, final: Path, step: int) -> None:
        sums = {f.name: _digest(f) for f in sorted(aside.iterdir())}
        (aside / _MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1), encoding="utf-8")
        _sync(aside / _MANIFEST)
        before = self.folder / f".step-{step:06d}.before"
        if final.exists():  # stopped again where it went on: never without one of the two
            shutil.rmtree(before, ignore_errors=True)
            os.replace(final, before)
        os.replace(aside, final)
        _sync(self.folder)
        shutil.rmtree(before, ignore_errors=True)
        for old in self._steps()[: -self.options.keep]:
            gone = old.with_name(f".{old.name}.gone")  # a name goes at once, its files do not
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _tidy(self) -> None:
        """After a kill: bring back a checkpoint whose successor did not come, remove what was being written or removed."""
        for before in self.folder.glob(".step-*.before"):
            final = self.folder / before.name.removeprefix(".").removesuffix(".before")
            if not final.exists():
                os.replace(before, final)
        for pattern in (".step-*.before", ".step-*.aside", ".step-*.gone"):
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    def _agree(self, problem: str) -> None:
        """Fail together: a process that alone could not write would leave the others waiting."""
        problems = [p for p in self._workers.objects([problem]) if p]
        if problems:
            hint = "free some space; the checkpoints before this one are whole, and the same command goes on from the last"
            raise Failed(Issue(str(self.folder), f"checkpoint could not be written: {problems[0]}", has_value=False, hint=hint))

    def _steps(self) -> list[Path]:
        found = (p for p in self.folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal())
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def latest(self, *, own: bool = True) -> Saved | None:
        """The newest checkpoint whose files match their checksums; damaged ones are passed over with a note.

        ``own=False`` leaves the folder as it is: another run may be writing there.
        """
        chosen = ""
        if self.ctx.is_main:
            if own:
                self._tidy()
            for folder in reversed(self._steps()):
                reason = damage(folder)
                if not reason:
                    chosen = folder.name
                    break
                self._note(f"checkpoint {folder.name} is damaged ({reason}); falling back to the one before")
        chosen = str(self._workers.objects([chosen])[0])
        return Saved(self.folder / chosen, self.ctx.device) if chosen else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where it is none."""
    value = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(value, dict) or not isinstance(value.get("step"), int) or not isinstance(value.get("sha256"), dict):
        raise ValueError("the manifest names no step or no files")
    return value


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty where nothing is."""
    try:
        sums = read_manifest(folder)["sha256"]
        if unnamed := {f.name for f in folder.iterdir()} - {*sums, _MANIFEST}:
            return f"{min(unnamed)} is not in its manifest"
        for name, expected in sums.items():
            if _digest(folder / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _attempt(action: Callable[[], Any]) -> str:
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as RuntimeError
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def _save(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(_detached(state), buffer)
    with path.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def _detached(value: Any) -> Any:
    """The same containers with tensors on the CPU and not larger than what they show."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_detached(v) for v in value]
    assert value is None or isinstance(value, (int, float, str, bool)), f"{type(value)} in a checkpoint"
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
