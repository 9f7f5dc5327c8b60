"""Single collectives for a communication hook: started now, finished as a future, never one inside another's callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """This process and how many there are."""
    return dist.get_rank(), dist.get_world_size()


def start_sum(tensor: Tensor) -> Any:
    """Begin an all-reduce in place; a future of a list that holds the sum."""
    return dist.all_reduce(tensor, async_op=True).get_future()


def start_gather(tensor: Tensor) -> tuple[Any, Tensor]:
    """Begin an all-gather of equal sizes; the future, and the tensor of shape (processes, n) that it fills."""
    out = tensor.new_empty(dist.get_world_size() * tensor.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: Any = gather(out, tensor, async_op=True)
    return work.get_future(), out.view(dist.get_world_size(), -1)


def start_all_to_all(parts: Sequence[Tensor]) -> tuple[Any, Tensor]:
    """Begin to send ``parts[p]`` to process p, and to receive what others have for this one, all of one size; (work, (processes, n))."""
    size, count = parts[dist.get_rank()].numel(), dist.get_world_size()
    out = parts[0].new_empty(count * size)
    work: Any = dist.all_to_all_single(out, torch.cat(list(parts)), [size] * count, [p.numel() for p in parts], async_op=True)
    return work, out.view(count, -1)


def average(tensor: Tensor) -> Tensor:
    """The mean over processes, in place, when it is there."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def finished(tensor: Tensor) -> Any:
    """A future that holds ``tensor`` already."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(tensor)
    return future
