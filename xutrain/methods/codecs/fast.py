"""Whether the compiled kernels are used. They give the same bits as the pure path, so the choice is only one of speed.

numba takes seconds to import, and more to compile on its first run ever. It is loaded once the pure path has lost about as
much time as that, so a short run never pays for it. ``XUTRAIN_PURE=1`` turns it off; ``load`` loads it at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

_LOADING = 2.0  # seconds that loading costs, about
_PER_CALL, _PER_ELEMENT = 1e-4, 2e-9  # seconds that a call of a kernel saves, about

_lost = 0.0


def kernels(elements: int) -> ModuleType | None:
    """The module of compiled kernels for work on ``elements`` elements, or None for the pure path."""
    global _lost
    if _lost < _LOADING:
        _lost += _PER_CALL + _PER_ELEMENT * elements
        return None
    return load()


def load() -> ModuleType | None:
    """The compiled kernels from now on, or None where numba is missing, unfit or turned off."""
    global _lost
    _lost = _LOADING
    return _loaded()


@functools.cache
def _loaded() -> ModuleType | None:
    if os.environ.get("XUTRAIN_PURE", "") not in ("", "0") or importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("xutrain.methods.codecs.compiled")
    except (ImportError, RuntimeError):  # a numba that does not fit this numpy, or no folder to cache in
        return None
