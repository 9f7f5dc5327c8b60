"""Several processes on GPUs: NCCL where each has a device of its own, gloo where they share one. Every verb, one process against two."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RECIPES = ["quantize/orq", "sparsify/def", "federate/domo", "pipeline/dsp", "vertical/afsgd", "prune/distill", "pretrain/dsm"]


def _xutrain(*words: str) -> dict[str, object]:
    environment = {**os.environ, "XUTRAIN_DEVICE": "cuda"}
    done = subprocess.run([sys.executable, "-m", "xutrain", *words, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_process_and_several(recipe: str) -> None:
    assert _xutrain("doctor", "--parity", recipe, "--steps", "3")["status"] == "equal"


def test_doctor_talks_over_nccl() -> None:
    value = _xutrain("doctor", "--nproc", str(max(2, torch.cuda.device_count())))
    checks = {c["check"]: c for c in value["checks"]}  # type: ignore[attr-defined]
    assert checks["nccl"]["status"] == "ok" and "ping" in checks["nccl"]["value"]
