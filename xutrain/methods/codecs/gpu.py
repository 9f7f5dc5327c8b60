"""Whether the Triton kernels are used: on CUDA, where triton is installed. They give the same bits as the portable path.

``XUTRAIN_PURE=1`` turns them off, as it does the compiled kernels of the CPU. Tests set ``interpreted`` to run them under triton's
interpreter on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

interpreted = os.environ.get("TRITON_INTERPRET", "") == "1" and os.environ.get("XUTRAIN_TRITON_ON_CPU", "") == "1"


def kernels(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels for tensors on ``device``, or None for the portable path."""
    return _loaded() if device.type == "cuda" or interpreted else None


@functools.cache
def _loaded() -> ModuleType | None:
    if os.environ.get("XUTRAIN_PURE", "") not in ("", "0") or importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module("xutrain.methods.codecs.triton_kernels")
    except (ImportError, RuntimeError):  # a triton that does not fit this torch or driver
        return None
