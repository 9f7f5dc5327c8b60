"""Shared by all tests: one thread, no accelerator, data and runs in temporary folders, real processes by fork."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("XUTRAIN_DEVICE", "cpu")

import pytest
import torch

torch.set_num_threads(1)


def run_forked(function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Run ``function(*arguments)`` in forked processes joined over gloo; returns what each returned, by rank.

    ``Context.open()`` inside finds the group already there. Fails with the first rank's traceback.
    """
    if processes == 1:
        return [function(*arguments)]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        pipes = [context.Pipe(duplex=False) for _ in range(processes)]
        children = [context.Process(target=_child, args=(rank, processes, store, pipes[rank][1], function, arguments), daemon=True) for rank in range(processes)]
        for child in children:
            child.start()
        answers = []
        for rank, (receiver, _) in enumerate(pipes):
            if not receiver.poll(timeout):
                for child in children:
                    child.kill()
                raise AssertionError(f"rank {rank} of {processes} did not answer within {timeout} s")
            answers.append(pickle.loads(receiver.recv_bytes()))
        for child in children:
            child.join(10)
    faults = [text for ok, text in answers if not ok]
    assert not faults, "\n".join(faults)
    return [value for _, value in answers]


def _child(rank: int, processes: int, store: str, answer: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        answer.send_bytes(pickle.dumps((True, function(*arguments))))  # plain pickle copies tensors; the pipe's own would share memory
        dist.barrier()
    except BaseException:
        answer.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    os._exit(0)


@pytest.fixture
def forked() -> Callable[..., list[Any]]:
    """``forked(function, processes, *arguments)``: see run_forked."""
    return run_forked


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for run folders."""
    return tmp_path / "runs"
