"""A process that dies at any moment of a save leaves a whole checkpoint, and nothing beside it once a run has started again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from xutrain.engine import checkpoint
from xutrain.engine.checkpoint import Checkpoints, damage
from xutrain.engine.context import Context
from xutrain.recipe.schema import Checkpoint


class Died(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def _dying_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """The ``call``-th rename, removal or sync from here on is not reached; a removal has then taken one file."""
    counted = iter(range(10**6))
    rename, remove, sync = os.replace, shutil.rmtree, os.fsync

    def replace(*args: Any) -> None:
        if next(counted) == call:
            raise Died
        rename(*args)

    def rmtree(path: Path, **words: Any) -> None:
        if Path(path).exists() and next(counted) == call:
            next(p for p in Path(path).iterdir() if p.is_file()).unlink()
            raise Died
        remove(path, **words)

    def fsync(descriptor: int) -> None:
        if next(counted) == call:
            raise Died
        sync(descriptor)

    patch.setattr(checkpoint.os, "replace", replace)
    patch.setattr(checkpoint.shutil, "rmtree", rmtree)
    patch.setattr(checkpoint.os, "fsync", fsync)


def _save(checkpoints: Checkpoints, step: int, value: int) -> None:
    checkpoints.save(
        step, shared={"value": value}, workers={0: {"x": torch.full((3,), value)}}, model={"w": torch.full((2,), float(value))}
    )


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("again", [True, False], ids=["the same step", "a later step"])
def test_dies_at_every_moment(tmp_path: Path, again: bool, keep: int) -> None:
    moments = 0
    for call in range(100):
        folder = tmp_path / str(call)
        checkpoints = Checkpoints(folder, Checkpoint(keep=keep), Context())
        if keep == 2:
            _save(checkpoints, 1, 1)
        _save(checkpoints, 2, 2)
        with pytest.MonkeyPatch.context() as patch:
            _dying_at(call, patch)
            try:
                _save(checkpoints, 2 if again else 3, 3)
                died = False
            except Died:
                died = True
        saved = Checkpoints(folder, Checkpoint(keep=keep), Context()).latest()
        assert saved is not None, f"nothing is left after call {call}"
        value = saved.shared["value"]
        assert value in ((2, 3) if died else (3,)) and float(saved.model()["w"][0]) == value == int(saved.worker(0)["x"][0])
        left = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert all(n.startswith("step-") and not damage(folder / "checkpoints" / n) for n in left), f"call {call}: {left}"
        if not died:
            assert len(left) == keep
            break
        moments += 1
    assert 5 <= moments < 99
