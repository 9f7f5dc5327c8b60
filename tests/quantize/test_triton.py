"""The Triton kernels give the bytes of the portable path: under triton's interpreter here, on CUDA where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xutrain

CASES = [
    ("orq", {"levels": 3, "bucket": 64}, 1000),
    ("orq", {"levels": 9, "bucket": 100}, 777),
    ("orq", {"levels": 9, "level_dtype": "bf16"}, 4100),
    ("qsgd", {"levels": 9, "norm": "l2", "bucket": 128}, 513),
    ("qsgd", {"levels": 3}, 1),
    ("terngrad", {"bucket": 2048}, 5000),
    ("bingrad_pb", {"bucket": 256}, 3001),
    ("linear", {"levels": 9, "bucket": 1}, 17),
    ("orq", {"levels": 5, "bucket": 50}, 1001),
    ("orq", {"levels": 17, "bucket": 64}, 700),
    ("qsgd", {"levels": 5}, 23),
    ("linear", {"levels": 17, "bucket": 7}, 15),
    ("qsgd", {"levels": 17}, 16),
    ("bingrad_b", {"bucket": 64}, 300),
    ("scaled_sign", {}, 100),
]

#: run with the kernels on and off in one process; both must give the same bytes and the same vector
CHECK = f"""
import torch, xutrain
from xutrain.methods.codecs import gpu
cases = {CASES!r}
for scale in (1.0, 1e38):
    for name, options, length in cases:
        vector = torch.randn(length, generator=torch.Generator().manual_seed(length)).clamp(-3, 3) * scale
        codec = xutrain.codec(name, **options)
        key = xutrain.key(seed=3, stream="round", step=5, worker=2)
        answers = []
        for on in (False, True):
            gpu.interpreted = on
            assert (gpu.kernels(vector.device) is not None) == on
            payload = codec.encode(vector, key)
            answers.append((payload.data, codec.decode(payload)))
        assert torch.equal(answers[0][0], answers[1][0]), ("bytes", name, options, length, scale)
        assert torch.equal(answers[0][1], answers[1][1]), ("values", name, options, length, scale)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    """TRITON_INTERPRET=1 computes the kernels with numpy: the arithmetic and the layout are checked, a GPU's compiler is not."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XUTRAIN_TRITON_ON_CPU": "1", "XUTRAIN_PURE": ""}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from xutrain.methods.codecs import packing, triton_kernels as k

common = {"length": "i32", "count": "i32", "bucket": "i32"}
pack = {"values": "*fp32", "levels": "*fp32", "out": "*u8", **common, "key": "*i64", "scale": "fp32"}
unpack = {"data": "*u8", "levels": "*fp32", "out": "*fp32", **common}
for base in k.BASES:
    many, size = packing.layout(base)
    fixed = {"BASE": base, "MANY": many, "SIZE": size, "BLOCK": 256}
    for kernel, signature in ((k._pack, pack), (k._unpack, unpack)):
        source = ASTSource(fn=kernel, signature={**signature, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed)
        built = compile(source, target=GPUTarget("cuda", 80, 32), options=dict(k._EXACT))
        assert "cubin" in built.asm and "fma" not in built.asm["ptx"], (kernel, base)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """Down to machine code for an A100, without a fused multiply-add; needs no GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": ""}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "options", "length"), [(n, o, k * 1000 + 7) for n, o, k in CASES])
def test_kernels_on_cuda(name: str, options: dict[str, object], length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes from the kernels as from torch's operations on the same device."""
    from xutrain.methods.codecs import gpu

    vector = torch.randn(length, generator=torch.Generator().manual_seed(length)).cuda()
    codec, key = xutrain.codec(name, **options), xutrain.key(seed=3)
    assert gpu.kernels(vector.device) is not None, "triton is not there"
    fused = codec.encode(vector, key)
    values = codec.decode(fused)
    monkeypatch.setattr(gpu, "kernels", lambda device: None)
    portable = codec.encode(vector, key)
    assert torch.equal(fused.data, portable.data)
    assert torch.equal(values, codec.decode(portable))


def test_off_without_a_gpu() -> None:
    from xutrain.methods.codecs import gpu

    assert gpu.interpreted or gpu.kernels(torch.device("cpu")) is None
