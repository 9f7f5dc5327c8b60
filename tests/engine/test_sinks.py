"""Weights & Biases offline and TensorBoard write their files and get out of the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xutrain.engine.record import read_json


def test_sinks_of_a_run(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = trained("orq", ["train.steps=4", "log.every=1", "log.wandb=offline", "log.tensorboard=true", "model.hidden=[8]"])
    assert read_json(folder / "state.json")["status"] == "done"
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert list((folder / "tensorboard").iterdir())


def test_a_missing_login_is_a_note(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = trained("orq", ["train.steps=2", "log.wandb=online", "model.hidden=[8]"])
    assert read_json(folder / "state.json")["status"] == "done"
    assert any("Weights & Biases" in note for note in read_json(folder / "run.json")["notes"])
