"""Whether compression will pay on this machine and network, measured before a long run. For `xutrain bench`.

Three numbers decide: what a codec takes per element, what the network takes per bit and message, and how much of a step is
communication at all. The first two are measured, the third by leaving communication out; the rest is arithmetic.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import xutrain
from xutrain.engine.network import Link
from xutrain.errors import Failed, Issue
from xutrain.launch import foresee, together
from xutrain.launch.plan import versions

#: label -> (name, options) of what is measured; the rest with --codec
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp": ("fp", {}),
    "bingrad-b": ("bingrad_b", {}),
    "orq-3": ("orq", {"levels": 3}),
    "orq-5": ("orq", {"levels": 5}),
    "orq-9": ("orq", {"levels": 9}),
    "terngrad": ("terngrad", {}),
    "qsgd-9": ("qsgd", {"levels": 9}),
    "eden-3": ("eden", {"levels": 3}),
    "scaled-sign": ("scaled_sign", {}),
    "top-k-64": ("top_k", {"ratio": 64}),
    "def block-64": ("random_block", {"ratio": 64}),
}
_LIMIT_S = 120
_SMALL, _LARGE = 1, 1 << 22  # elements of the two all-reduces that latency and bandwidth are read from


def measure(processes: int, workers: int | None, elements: int, names: list[str], recipe: Any = None) -> dict[str, Any] | None:
    """All of it; None on every rank but 0 where torchrun has started this command on several.

    Args:
        processes: how many to start here, where torchrun has not: they talk to each other over this machine's network.
        workers: N of the break-even points; None: as many as processes.
        elements: D of the vector that is exchanged; a recipe's own D where one is given.
        names: labels of ``CODECS``; all if empty.
        recipe: whose gradient and model the headroom is measured with; None: an MLP of about D parameters.
    """
    torch.set_num_threads(1)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    network: dict[str, Any] | None = None
    if started > 1:
        network = _joined(started)
        if int(os.environ.get("RANK", "0")):
            return None
    elif processes > 1:
        network = _forked(processes)
    count = started if started > 1 else processes
    compute, length = _gradient(recipe, elements)
    link = Link(network["bandwidth"], network["latency_s"]) if network else Link(1e9, 5e-5)
    wanted = workers or max(2, count)
    device = foresee._device()
    rows = []
    for label in names or list(CODECS):
        name, options = CODECS[label]
        codec = xutrain.codec(name, workers=wanted, **options)
        encode, decode = foresee.codec_seconds(codec, length, device)
        row: dict[str, Any] = {"codec": label, "encode_ns": 1e9 * encode / length, "decode_ns": 1e9 * decode / length}
        row |= foresee.break_even(codec, length, wanted, encode, decode, link)
        at = row["break_even_bandwidth"]
        row["pays_here"] = at is not None and link.bandwidth < at if network else None
        rows.append(row)
    full = link.allreduce(32.0 * length, wanted)
    return {
        "versions": versions(),
        "device": str(device),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "processes": count,
        "workers": wanted,
        "elements": length,
        "network": network,
        "assumed_network": None if network else {"bandwidth": link.bandwidth, "latency_s": link.latency},
        "gradient_s": compute,
        "fp32_all_reduce_s": full,
        "headroom": (compute + full) / compute,
        "codecs": rows,
    }


def _gradient(recipe: Any, elements: int) -> tuple[float, int]:
    """Seconds of one gradient, and the number of parameters."""
    if recipe is not None:
        from xutrain.loops import data_parallel

        ctx = foresee.Alone(recipe.seed, device=foresee._device())
        job, _ = data_parallel.outlined(recipe, ctx)
        return foresee._gradient_seconds(recipe, ctx, job), job.replica.numel
    side = max(2, int((elements / 2) ** 0.5))
    net = nn.Sequential(nn.Linear(side, side), nn.ReLU(), nn.Linear(side, side)).to(foresee._device())
    inputs = torch.randn(32, side, device=foresee._device())
    times = []
    for _ in range(6):
        net.zero_grad()
        began = foresee._clock(inputs.device)
        net(inputs).square().mean().backward()
        times.append(foresee._clock(inputs.device) - began)
    return statistics.median(times[1:]), elements


def _forked(count: int) -> dict[str, Any]:
    """The network between ``count`` processes of this machine. Raises Failed."""
    answer = together.ask(_child, _backend(count), count, _LIMIT_S)
    if isinstance(answer, str):
        raise Failed(Issue("--processes", f"{count} processes did not talk to each other: {answer}", count, "xutrain doctor"))
    return dict(answer)


def _child(backend: str, rank: int, count: int, store: str, answer: Any) -> None:
    torch.set_num_threads(1)
    try:
        found = _timed(backend, rank, count, f"file://{store}")
        if rank == 0:
            answer.send(found)
    except (RuntimeError, ValueError) as error:  # dist raises subclasses of RuntimeError
        answer.send(str(error).splitlines()[0])
    os._exit(0)


def _joined(count: int) -> dict[str, Any]:
    """The network between the processes that torchrun has started, on however many machines."""
    return _timed(_backend(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), int(os.environ["RANK"]), count, "env://")


def _backend(count: int) -> str:
    return "nccl" if foresee._device().type == "cuda" and torch.cuda.device_count() >= count else "gloo"


def _timed(backend: str, rank: int, count: int, method: str) -> dict[str, Any]:
    """Latency of a message and bits per second of a link, from a small and a large all-reduce (a ring of 2 (n-1) messages)."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=_LIMIT_S))
    medians = []
    for size, times in ((_SMALL, 30), (_LARGE, 5)):
        vector, taken = torch.zeros(size, device=device), []
        for _ in range(times):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(vector)
            foresee._clock(device)
            taken.append(time.perf_counter() - began)
        medians.append(statistics.median(taken[1:]))
    dist.barrier()
    dist.destroy_process_group()
    hops = 2 * (count - 1)
    latency = medians[0] / hops
    bandwidth = hops / count * 32 * _LARGE / max(medians[1] - medians[0], 1e-9)
    return {"backend": backend, "latency_s": latency, "bandwidth": bandwidth, "all_reduce_16_mib_s": medians[1]}
