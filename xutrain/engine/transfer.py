"""How long a message between two processes of this machine takes."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist


def one_way_seconds(bits: int, repeats: int = 20) -> float:
    """Median one-way seconds of a message of ``bits`` over gloo, from a ping-pong between two forked processes."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        children = [
            context.Process(target=_play, args=(rank, f"file://{folder}/store", bits // 8, repeats, sender), daemon=True)
            for rank in range(2)
        ]
        for child in children:
            child.start()
        found = receiver.recv() if receiver.poll(60) else float("nan")
        for child in children:
            child.join(10)
            if child.is_alive():
                child.kill()
    return float(found)


def _play(rank: int, store: str, size: int, repeats: int, answer: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    buffer = torch.zeros(max(1, size), dtype=torch.uint8)
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        for source in (0, 1):
            dist.send(buffer, 1 - rank) if rank == source else dist.recv(buffer, 1 - rank)
        times.append((time.perf_counter() - began) / 2)
    if rank == 0:
        answer.send(sorted(times[2:])[repeats // 2])
    dist.barrier()
    dist.destroy_process_group()
