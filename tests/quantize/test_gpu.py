"""What only a GPU can show: the same draws, the same payload sizes and sound training on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xutrain
from xutrain import registry
from xutrain.engine.rng import key

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CODECS = [e.name for e in registry.entries("codec", "quantize")]


def test_draws_are_the_same_on_the_device() -> None:
    draw = key(seed=1, stream="x", step=5, worker=2)
    assert torch.equal(draw.uniform(100_003), draw.uniform(100_003, "cuda").cpu())


@pytest.mark.parametrize("name", CODECS)
def test_codec_on_cuda(name: str) -> None:
    codec = xutrain.codec(name, **({"ratio": 8} if name in ("random_block", "random_k", "top_k") else {}))
    if not hasattr(codec, "encode"):
        pytest.skip("not a vector codec")
    vector = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    draw = key(seed=0, stream="round", step=1)
    here, there = codec.encode(vector, key=draw), codec.encode(vector.cuda(), key=draw)
    assert there.data.is_cuda and there.bits == here.bits
    error_here = float((codec.decode(here) - vector).norm())
    error_there = float((codec.decode(there).cpu() - vector).norm())
    assert error_there == pytest.approx(error_here, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("codec", ["fp", "orq", "bingrad_b", "eden"])
def test_training_on_cuda(codec: str, tmp_path: Path) -> None:
    environment = {**os.environ, "XUTRAIN_DEVICE": "cuda"}
    command = [sys.executable, "-m", "xutrain", "quantize", "--config", "orq", f"codec={codec}", "--json", "-q", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    import json

    assert json.loads(done.stdout)["metrics"]["test_accuracy"] > 0.93
