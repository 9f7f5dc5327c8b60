"""Where a run runs: its process among the others, its device, its seed, its meter."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist

from xutrain.engine.meter import BitMeter
from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers


@dataclass
class Context:
    """One process of a run. Use ``Context.open``; as a context manager it leaves the process group at the end.

    Attributes:
        rank, processes: this process and how many there are.
        device: where tensors live.
        seed: the run's seed, from which ``key`` derives every draw.
        meter: counts bits.
    """

    seed: int = 0
    rank: int = 0
    processes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    deterministic: bool = True
    meter: BitMeter = field(default_factory=BitMeter)
    owns_group: bool = False

    @classmethod
    def open(
        cls, seed: int = 0, *, deterministic: bool = True, threads: int = 1, timeout_s: float = 600, init_method: str | None = None
    ) -> Context:
        """Join the processes that torchrun's environment describes (alone without one)."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        torch.set_num_threads(threads)
        device = torch.device("cpu")
        if torch.cuda.is_available() and os.environ.get("XUTRAIN_DEVICE", "cuda") != "cpu":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        owns = processes > 1 and not dist.is_initialized()
        if owns:
            # gloo beside nccl: packed bytes, flags and objects of CPU-side code travel without touching the device
            backend = (
                "cpu:gloo,cuda:nccl"
                if device.type == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
                else "gloo"
            )
            timeout = datetime.timedelta(seconds=timeout_s)
            dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=processes, timeout=timeout)
        return cls(seed, rank, processes, device, deterministic, owns_group=owns)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def key(self, stream: str, step: int = 0, worker: int = 0) -> Key:
        """The key of one draw of this run."""
        return Key(self.seed, stream, step, worker)

    def workers(self, count: int, reduction: Literal["exact", "ring"] = "exact") -> Workers:
        """``count`` logical workers in contiguous blocks over the processes."""
        return Workers(count, self.rank, self.processes, reduction)

    def seed_torch(self, stream: str, step: int = 0, worker: int = 0) -> None:
        """Seed torch's global generators (dropout, initialisation) for one place of the run."""
        seed = self.key(stream, step, worker).integer
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the same stream as torch.manual_seed, which costs a millisecond
        else:
            torch.manual_seed(seed)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.owns_group and dist.is_initialized() and kind is None:
            dist.destroy_process_group()  # after a fault the launcher ends the others; waiting for them would hang
