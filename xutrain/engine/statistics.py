"""Running statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Batch statistics are used but running ones are left alone: so a batch that passes twice counts once."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    held = [(n, n.running_mean, n.running_var) for n in norms if isinstance(n, _InstanceNorm) and n.training]
    for norm in norms:
        norm.track_running_stats = False
    for norm, _, _ in held:  # an instance norm writes to what it has, whatever the flag says
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for norm, mean, variance in held:
            norm.running_mean, norm.running_var = mean, variance
