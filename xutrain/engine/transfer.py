"""How long a message between two processes of this machine takes, and what it costs their processors."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from xutrain.errors import Failed, Issue

_PATIENCE_S = 120


def message_seconds(bits: int, repeats: int = 50) -> tuple[float, float]:
    """Of a message of ``bits`` over gloo: median one-way seconds, and mean processor seconds at one end.

    From a ping-pong between two forked processes; the processor seconds are those of all threads of a process.

    Raises:
        Failed: they could not talk.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        children = [
            context.Process(target=_play, args=(rank, f"file://{folder}/store", bits // 8, repeats, sender), daemon=True)
            for rank in range(2)
        ]
        for child in children:
            child.start()
        found = receiver.recv() if receiver.poll(_PATIENCE_S) else None
        for child in children:
            child.join(10)
            if child.is_alive():
                child.kill()
    if found is None:
        raise Failed(Issue("", f"two processes did not exchange {repeats} messages within {_PATIENCE_S} s", has_value=False))
    return float(found[0]), float(found[1])


def _play(rank: int, store: str, size: int, repeats: int, answer: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    buffer = torch.zeros(max(1, size), dtype=torch.uint8)
    times = []
    for i in range(repeats + 2):
        if i == 2:
            worked = time.process_time()
        began = time.perf_counter()
        for source in (0, 1):
            dist.send(buffer, 1 - rank) if rank == source else dist.recv(buffer, 1 - rank)
        times.append((time.perf_counter() - began) / 2)
    if rank == 0:
        answer.send((sorted(times[2:])[repeats // 2], (time.process_time() - worked) / (2 * repeats)))
    dist.barrier()
    dist.destroy_process_group()
