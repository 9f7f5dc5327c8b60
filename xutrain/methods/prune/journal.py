"""What survives a kill: which layers are written, and the hidden states that the next layer starts from.

A line is added to the journal only after the layer's tensors are on the disk; a layer without its line is done again, and
gives the same bytes at the same places.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xutrain.errors import DataError, Issue, UsageError
from xutrain.models.shards import CODES, SINGLE, Source, Target, header_of, write_aside

WORK = ".xutrain"
REPORT = "pruning.json"


def identity(source: Source, tokens: Tensor, options: dict[str, Any]) -> str:
    """Names a pruning: the checkpoint's headers, sizes and dates, the calibration tokens, the options."""
    digest = hashlib.sha256()
    for file, header in sorted(source.headers.items()):
        stat = (source.folder / file).stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode() + header)
    digest.update(repr(tuple(tokens.shape)).encode() + tokens.to(torch.int64).contiguous().numpy().tobytes())
    digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


class Journal:
    """The journal of one output folder. All processes read it; one writes."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name = out, name
        self.folder = out / WORK
        self.file = self.folder / "journal.jsonl"
        self.lines: list[dict[str, Any]] = []

    def finished(self) -> dict[str, Any] | None:
        """The report of a finished pruning of this name, or None.

        Raises:
            UsageError: the folder holds something else.
        """
        report = self.out / REPORT
        if report.exists():
            found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            if found.get("identity") == self.name:
                shutil.rmtree(self.folder, ignore_errors=True)  # killed after the report was written
                return found
            if not self.folder.exists():
                self._occupied("holds the result of another pruning")
        if self.out.exists() and any(p.name != WORK for p in self.out.iterdir()) and not self.file.exists():
            self._occupied("is not empty")
        return None

    def open(self) -> None:
        """Read what an interrupted run left. Raises UsageError when that was another pruning."""
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    self.lines.append(json.loads(text))
                except ValueError:
                    break  # the line that was being written when the run was killed
            if self.lines and self.lines[0].get("identity") != self.name:
                self._occupied("holds an unfinished pruning with other options, another checkpoint or other calibration tokens")

    def start(self) -> None:
        """Create the work folder. Called by one process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.lines or [{"identity": self.name}]
        write_aside(self.file, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.lines = kept

    def _occupied(self, what: str) -> None:
        hint = "choose another output folder, or delete this one if it is not needed"
        raise UsageError(Issue(str(self.out), f"the output folder {what}", hint=hint, has_value=False))

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def has(self, key: str, value: object) -> bool:
        return any(line.get(key) == value for line in self.lines)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Lines of finished layers, in order; a layer done again after a kill counts once."""
        last = {line["layer"]: line for line in self.lines if "layer" in line}
        return [last[n] for n in sorted(last)]

    def save_hidden(self, layer: int, hidden: Tensor) -> None:
        """Keep the hidden states that ``layer`` starts from; the older ones go. Called after ``add`` of the layer before it: a kill
        between the two leaves the older states, from which one layer is done again."""
        aside = self.folder / f"hidden-{layer:04d}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        target = Target(aside, {SINGLE: header_of({"hidden": (CODES[hidden.dtype], tuple(hidden.shape))})})
        target.create()
        target.write("hidden", hidden)
        target.sync()
        target.close()
        final = self.folder / f"hidden-{layer:04d}"
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in self.folder.glob("hidden-*"):
            if old.name != final.name:
                shutil.rmtree(old, ignore_errors=True)

    def resume_at(self) -> tuple[int, Tensor | None]:
        """The first layer to do and its hidden states (None: from the embedding)."""
        done = [n for n, line in enumerate(self.layers) if line["layer"] == n]
        for layer in range(len(done), 0, -1):
            folder = self.folder / f"hidden-{layer:04d}"
            if folder.is_dir():
                try:
                    source = Source(folder)
                except DataError:
                    continue  # killed while it was written
                hidden = source.read("hidden")
                source.close()
                return layer, hidden
        return 0, None

    def finish(self, report: dict[str, Any]) -> None:
        """Write the report and drop the work folder: from here on the folder is a checkpoint like any other."""
        write_aside(self.out / REPORT, (json.dumps({"identity": self.name, **report}, indent=1) + "\n").encode())
        shutil.rmtree(self.folder)
