"""The examples run as their first lines say, from a folder of the reader's own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(name: str, folder: Path, *arguments: str, ranks: int = 2) -> str:
    before = TORCHRUN if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XUTRAIN_DEVICE": "cpu"}
    command = [sys.executable, *before, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {"ddp_hook.py", "hf_trainer.py", "dsm_loop.py", "moe_prune_folder.py"}
    page = (EXAMPLES.parent / "docs" / "library.md").read_text(encoding="utf-8")
    assert all(f"examples/{p.name}" in page for p in EXAMPLES.glob("*.py"))


def test_ddp_hook(tmp_path: Path) -> None:
    text = start("ddp_hook.py", tmp_path, "--epochs", "12", "--state", "residuals", "levels=9")
    found = re.search(r"orq-9: test accuracy (0\.\d+), sent \d+ kB a rank, (\d+\.\d) times", text)
    assert found and float(found[1]) > 0.9 and float(found[2]) > 9, text
    assert (tmp_path / "residuals-1.pt").exists()


@pytest.mark.slow
def test_ddp_hook_as_def(tmp_path: Path) -> None:
    text = start("ddp_hook.py", tmp_path, "--codec", "random_block", "ratio=16", "--feedback", "--coeff", "0.5")
    found = re.search(r"test accuracy (0\.\d+)", text)
    assert found and float(found[1]) > 0.8, text


def test_moe_prune_folder(tmp_path: Path) -> None:
    assert "0.500 of the expert weights are zero" in start("moe_prune_folder.py", tmp_path, "--pattern", "2:4", ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_dsm_loop(ranks: int, tmp_path: Path) -> None:
    found = re.search(r"(\d) ranks, 300 steps, 50 exchanges: test accuracy (0\.\d+)", start("dsm_loop.py", tmp_path, ranks=ranks))
    assert found and int(found[1]) == ranks and float(found[2]) > 0.85


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate: pip install 'xutrain[trainer]'")
def test_hf_trainer(tmp_path: Path) -> None:
    found = re.search(r"orq: loss (\d\.\d+) -> (\d\.\d+), (\d\.\d+) MB sent", start("hf_trainer.py", tmp_path))
    assert found and float(found[2]) < 0.7 * float(found[1])
