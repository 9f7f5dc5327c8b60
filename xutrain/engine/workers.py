"""N logical workers in contiguous blocks over P processes, and what they exchange.

Every method is defined for N workers. In exact mode results are combined in worker order, so they do not depend on P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


class Workers:
    """The logical workers of a run, seen from one process.

    Attributes:
        count: N, how many there are.
        hosted: the range of workers that this process computes.
        reduction: "exact" adds in worker order; "ring" adds local sums by all-reduce.
    """

    def __init__(self, count: int, rank: int = 0, processes: int = 1, reduction: Literal["exact", "ring"] = "exact") -> None:
        assert count % processes == 0, f"{count} workers over {processes} processes"
        self.count = count
        self.rank = rank
        self.processes = processes
        self.reduction = reduction
        self.each = count // processes
        self.hosted = range(rank * self.each, (rank + 1) * self.each)

    def owner(self, worker: int) -> int:
        """The process that computes ``worker``."""
        return worker // self.each

    def gather(self, tensors: Sequence[Tensor], *, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """One tensor of every worker, in worker order, on every process; give one per hosted worker.

        The tensors are of one dtype; trailing shapes are equal, first dimensions may differ. ``sizes`` (first dimensions
        of all N) saves the exchange of sizes where they are known.
        """
        assert len(tensors) == len(self.hosted)
        if self.processes == 1:
            return list(tensors)
        if sizes is None:
            mine = torch.tensor([len(t) for t in tensors], dtype=torch.int64, device=tensors[0].device)
            sizes = [int(n) for n in self._all_gather(mine)]
        shape = tensors[0].shape[1:]
        totals = [sum(sizes[r * self.each : (r + 1) * self.each]) for r in range(self.processes)]
        flat = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        longest = max(totals)
        if len(flat) < longest:  # gloo gathers equal sizes only
            flat = torch.cat([flat, flat.new_zeros((longest - len(flat), *shape))])
        everyone = self._all_gather(flat.contiguous())
        found: list[Tensor] = []
        for r in range(self.processes):
            at = r * longest
            for w in range(r * self.each, (r + 1) * self.each):
                found.append(everyone[at : at + sizes[w]])
                at += sizes[w]
        return found

    def _all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty((self.processes * len(tensor), *tensor.shape[1:]))
        _all_gather_into(out, tensor)
        return out

    def sum(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum over all workers of one tensor each, the same on every process."""
        if self.reduction == "ring":
            total = torch.stack(list(tensors)).sum(dim=0) if len(tensors) > 1 else tensors[0].clone()
            if self.processes > 1:
                dist.all_reduce(total)
            return total
        shape = tensors[0].shape
        everyone = self.gather([t.reshape(-1) for t in tensors], sizes=[tensors[0].numel()] * self.count)
        total = everyone[0].clone()
        for tensor in everyone[1:]:
            total += tensor
        return total.reshape(shape)

    def mean(self, tensors: Sequence[Tensor]) -> Tensor:
        """The mean over all workers of one tensor each, the same on every process."""
        return self.sum(tensors).div_(self.count)

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> Tensor:
        """This process's block of the sum over all workers; lengths are multiples of the number of processes (ring sums)."""
        total = torch.stack(list(tensors)).sum(dim=0) if len(tensors) > 1 else tensors[0].clone()
        if self.processes == 1:
            return total
        out = total.new_empty(len(total) // self.processes)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the newer name of torch 2.13
        scatter(out, total)
        return out

    def gather_at_server(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """One equally sized tensor of every worker, in worker order, on worker 0's process; None elsewhere."""
        if self.processes == 1:
            return list(tensors)
        block = torch.cat(list(tensors))
        blocks = [torch.empty_like(block) for _ in range(self.processes)] if self.rank == 0 else None
        dist.gather(block, blocks, dst=0)
        return None if blocks is None else [part for received in blocks for part in received.chunk(self.each)]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """``tensor`` of worker ``source``, on every process (in place where it is received)."""
        if self.processes > 1:
            dist.broadcast(tensor, self.owner(source))
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every process where the flag is set on at least one."""
        if self.processes == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_cpu_group())
        return bool(value.item())

    def least(self, *values: int) -> tuple[int, ...]:
        """The smallest of the processes' values, on every process; one for each that is given."""
        if self.processes == 1:
            return values
        held = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(held, op=dist.ReduceOp.MIN, group=_cpu_group())
        return tuple(int(v) for v in held)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def objects(self, hosted: Sequence[Any]) -> list[Any]:
        """One small Python value (plain containers, numbers, text) of every worker, in worker order, on every process."""
        if self.processes == 1:
            return list(hosted)
        everyone: list[Any] = [None] * self.processes
        dist.all_gather_object(everyone, list(hosted), group=_cpu_group())
        return [value for block in everyone for value in block]

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send ``parts[p]`` (uint8, 1-D) to process p; returns what each process sent here, whose lengths are ``sizes``."""
        if self.processes == 1:
            return list(parts)
        out = parts[0].new_empty(sum(sizes))
        dist.all_to_all_single(out, torch.cat(list(parts)), list(sizes), [len(p) for p in parts])
        return list(out.split(list(sizes)))


def _all_gather_into(out: Tensor, tensor: Tensor) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the newer name of torch 2.13
    gather(out, tensor)


def joined() -> tuple[int, int]:
    """(rank, processes) of the process group that this process has joined; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _cpu_group() -> Any:
    """The group of CPU tensors: the default one, which holds a gloo backend for them."""
    return dist.group.WORLD
