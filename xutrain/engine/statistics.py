"""Running statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Batch statistics are used but running ones are left alone: so a batch that passes twice counts once."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
