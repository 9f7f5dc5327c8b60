"""Shared by all tests: one thread, no accelerator, data and runs in temporary folders, real processes by fork."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("XUTRAIN_DEVICE", "cpu")

import pytest
import torch

torch.set_num_threads(1)


def run_forked(function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 280) -> list[Any]:
    """Run ``function(*arguments)`` in forked processes joined over gloo; returns what each returned, by rank.

    ``Context.open()`` inside finds the group already there. Fails with the first rank's traceback. ``timeout`` is against a
    hang only: a busy machine may need minutes.
    """
    if processes == 1:
        return [function(*arguments)]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        pipes = [context.Pipe(duplex=False) for _ in range(processes)]
        children = [
            context.Process(target=_child, args=(rank, processes, store, pipes[rank][1], function, arguments), daemon=True)
            for rank in range(processes)
        ]
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


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A loop that a test calls directly leaves its handlers behind; the next test starts with the usual ones."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def forked() -> Callable[..., list[Any]]:
    """``forked(function, processes, *arguments)``: see run_forked."""
    return run_forked


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for run folders."""
    return tmp_path / "runs"


def train(config: str, out: Path, overrides: list[str], processes: int = 1, verb: str | None = None) -> Path:
    """Run a recipe in ``processes`` forked processes, as the launcher would; returns the run folder."""
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    prepared = plan(load(config, verb, overrides), out=out, nproc=processes, verbosity=-1)
    prepared.write()
    run_forked(_execute, processes, prepared.folder)
    return prepared.folder


def _execute(folder: Path) -> int:
    from xutrain.worker import execute

    return execute(folder)


@pytest.fixture
def trained(runs: Path) -> Callable[..., Path]:
    """``trained(config, overrides, processes=1, out=None)`` -> run folder; a second call resumes what is unfinished."""

    def run(config: str, overrides: list[str], processes: int = 1, verb: str | None = None, out: str = "a") -> Path:
        return train(config, runs / out, overrides, processes, verb)

    return run


def weights(folder: Path) -> bytes:
    """The bytes of a run's last model file; of all state where the parties keep their own parts of the model."""
    last = max((folder / "checkpoints").glob("step-*"))
    model = last / "model.safetensors"
    return model.read_bytes() if model.is_file() else (last / "manifest.json").read_bytes()


def values(folder: Path) -> list[tuple[Any, ...]]:
    """A run's metrics without times."""
    from xutrain.engine.record import read_metrics

    return [(v["step"], v["name"], v["value"], v["bits_up"], v["bits_down"]) for v in read_metrics(folder)]
