"""Killed and run again, on several processes, or in one go: the same files, by SHA-256."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_model import digest, save, tokens

from xutrain.engine.workers import Workers
from xutrain.errors import RecipeError, Stopped, UsageError
from xutrain.methods.prune.checkpoint import prune_checkpoint
from xutrain.methods.prune.journal import Journal
from xutrain.models.shards import Target

METHODS: list[dict[str, Any]] = [
    {"method": "moe_pruner"},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "path", "propagate": "dense"},
    {"method": "random"},
    {"method": "wanda", "rescale": True},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "dense"
    save("mixtral", folder)
    return folder


def files(folder: Path) -> dict[str, str]:
    assert not (folder / ".xutrain").exists()
    return {**digest(folder), **{f.name: f.read_text() for f in folder.glob("*.json")}}


@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_stopped_after_any_layer_and_continued(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    prune_checkpoint(dense, tmp_path / "whole", tokens(), batch=2, **options)
    stops = 0
    for _ in range(5):
        try:
            prune_checkpoint(dense, tmp_path / "parts", tokens(), batch=2, progress=lambda done, total: True, **options)
            break
        except Stopped:
            stops += 1
            assert not (tmp_path / "parts" / "model.safetensors.index.json").exists()
    assert stops == 2
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert prune_checkpoint(dense, tmp_path / "parts", tokens(), batch=2, **options).already


def _ranked(dense: Path, out: Path, options: dict[str, Any]) -> float:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return prune_checkpoint(dense, out, tokens(), batch=2, workers=Workers(count, rank, count), **options).error


@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_one_and_several_processes(dense: Path, tmp_path: Path, forked: Any, options: dict[str, Any]) -> None:
    prune_checkpoint(dense, tmp_path / "one", tokens(), batch=2, **options)
    for count in (2, 3):
        forked(_ranked, count, dense, tmp_path / str(count), options)
        assert files(tmp_path / str(count)) == files(tmp_path / "one")


def _killed_at(dense: Path, out: Path, at: int) -> None:
    plain, writes = Target.write, iter(range(1, 10**6))

    def write(self: Target, name: str, tensor: torch.Tensor) -> None:
        plain(self, name, tensor)
        if next(writes) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    Target.write = write  # type: ignore[method-assign]
    prune_checkpoint(dense, out, tokens(), batch=2)


def test_killed_in_the_middle_of_a_layer(dense: Path, tmp_path: Path) -> None:
    prune_checkpoint(dense, tmp_path / "whole", tokens(), batch=2)
    out = tmp_path / "killed"
    for at in (5, 20):  # inside the first layer; then, going on, inside a later one (hidden states are written there too)
        child = multiprocessing.get_context("fork").Process(target=_killed_at, args=(dense, out, at))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    prune_checkpoint(dense, out, tokens(), batch=2)
    assert files(out) == files(tmp_path / "whole")


def test_a_torn_journal_line_and_a_torn_hidden_file_are_done_again(dense: Path, tmp_path: Path) -> None:
    prune_checkpoint(dense, tmp_path / "whole", tokens(), batch=2)
    out = tmp_path / "torn"
    with pytest.raises(Stopped):
        prune_checkpoint(dense, out, tokens(), batch=2, progress=lambda done, total: done == 2)
    journal = out / ".xutrain" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-9])
    shutil.copytree(out, tmp_path / "torn2")
    prune_checkpoint(dense, out, tokens(), batch=2)
    assert files(out) == files(tmp_path / "whole")
    (hidden,) = (tmp_path / "torn2" / ".xutrain").glob("hidden-*/model.safetensors")
    hidden.write_bytes(hidden.read_bytes()[:100])
    prune_checkpoint(dense, tmp_path / "torn2", tokens(), batch=2)
    assert files(tmp_path / "torn2") == files(tmp_path / "whole")


def test_saving_hidden_states_rarely_changes_nothing(dense: Path, tmp_path: Path) -> None:
    prune_checkpoint(dense, tmp_path / "whole", tokens(), batch=2)
    with pytest.raises(Stopped):
        prune_checkpoint(dense, tmp_path / "rare", tokens(), batch=2, save_every=2, progress=lambda done, total: done == 1)
    prune_checkpoint(dense, tmp_path / "rare", tokens(), batch=2, save_every=2)
    assert files(tmp_path / "rare") == files(tmp_path / "whole")


def test_another_pruning_in_the_same_folder_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        prune_checkpoint(dense, tmp_path / "out", tokens(), progress=lambda done, total: True)
    with pytest.raises(UsageError, match="unfinished pruning"):
        prune_checkpoint(dense, tmp_path / "out", tokens(), sparsity=0.6)
    prune_checkpoint(dense, tmp_path / "out", tokens())
    with pytest.raises(UsageError, match="another pruning"):
        prune_checkpoint(dense, tmp_path / "out", tokens(seed=2))


def test_cached_sums_cut_again_without_calibration(dense: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"propagate": "dense"}
    prune_checkpoint(dense, tmp_path / "half", tokens(), save_sums=tmp_path / "sums", **common)
    for pattern, p in (("unstructured", 0.7), ("2:4", 0.5), ("1:4", 0.5)):
        direct = prune_checkpoint(dense, tmp_path / f"direct{pattern}", tokens(), pattern=pattern, sparsity=p, **common)
        again = prune_checkpoint(dense, tmp_path / f"again{pattern}", tokens(), pattern=pattern, sparsity=p, from_sums=tmp_path / "sums")
        assert digest(direct.folder) == digest(again.folder) and again.sparsity == pytest.approx(direct.sparsity)
    with pytest.raises(RecipeError, match="another method"):
        prune_checkpoint(dense, tmp_path / "x", tokens(), method="wanda", from_sums=tmp_path / "sums")
    with pytest.raises(RecipeError, match="no sums"):
        prune_checkpoint(dense, tmp_path / "y", tokens(), method="magnitude", save_sums=tmp_path / "z")


def test_dense_and_pruned_propagation_agree_in_the_first_layer_only(dense: Path, tmp_path: Path) -> None:
    from xutrain.models.shards import Source

    for how in ("dense", "pruned"):
        prune_checkpoint(dense, tmp_path / how, tokens(), propagate=how)
        prune_checkpoint(dense, tmp_path / f"{how}0", tokens(), propagate=how, sparsity=0.0)
    a, b = Source(tmp_path / "dense"), Source(tmp_path / "pruned")
    unequal = {n.split(".")[2] for n in a.entries if not torch.equal(a.read(n), b.read(n))}
    assert unequal and unequal <= {"1", "2"}
    assert digest(tmp_path / "dense0") == digest(tmp_path / "pruned0") == digest(dense)


@pytest.mark.parametrize("when", ["begins", "ends"])
def test_killed_while_the_journal_begins_or_ends(dense: Path, tmp_path: Path, when: str) -> None:
    """The work folder exists before its journal does, and goes file by file after the report is written."""
    prune_checkpoint(dense, tmp_path / "whole", tokens(), batch=2, method="random")
    out = tmp_path / "killed"
    if when == "ends":
        shutil.copytree(tmp_path / "whole", out)
    (out / ".xutrain" / "hidden-0001").mkdir(parents=True)
    report = prune_checkpoint(dense, out, tokens(), batch=2, method="random")
    assert report.already == (when == "ends")
    assert files(out) == files(tmp_path / "whole")


def test_killed_between_the_journal_and_the_hidden_states(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older hidden states are still there: one layer is done again, not all of them."""
    prune_checkpoint(dense, tmp_path / "whole", tokens(), batch=2)
    done: list[int] = []
    save_hidden, add = Journal.save_hidden, Journal.add

    def killed(self: Journal, layer: int, hidden: torch.Tensor) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        save_hidden(self, layer, hidden)

    def counted(self: Journal, line: dict[str, Any]) -> None:
        done.extend([line["layer"]] if "layer" in line else [])
        add(self, line)

    monkeypatch.setattr(Journal, "save_hidden", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(dense, tmp_path / "parts", tokens(), batch=2)
    monkeypatch.setattr(Journal, "save_hidden", save_hidden)
    monkeypatch.setattr(Journal, "add", counted)
    prune_checkpoint(dense, tmp_path / "parts", tokens(), batch=2)
    assert done == [1, 2] and files(tmp_path / "parts") == files(tmp_path / "whole")
