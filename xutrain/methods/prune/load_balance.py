"""How evenly a router uses its experts (arXiv:2410.12013, eqs. 4-5)."""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.methods.prune.base import Routing


def coefficient_of_variation(counts: Tensor) -> float:
    """std(f) / mean(f) with the population standard deviation, for counts f (n,). Uniform gives 0, one expert gives sqrt(n - 1)."""
    wide = counts.double()
    mean = wide.mean()
    return float(wide.std(correction=0) / mean) if float(mean) > 0 else 0.0


def loads(routing: Routing) -> dict[str, Tensor]:
    """Tokens per expert: ``top1`` by the arg-max of the router (the paper's count), ``topk`` by every slot; int64 (n,)."""
    n = routing.prob.shape[1]
    return {
        "top1": torch.bincount(routing.prob.argmax(1), minlength=n),
        "topk": torch.bincount(routing.index.flatten(), minlength=n),
    }
