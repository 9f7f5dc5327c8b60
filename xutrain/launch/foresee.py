"""What a data-parallel step will take with N workers on a given network: measured arithmetic, modelled messages.

    step = gradient + exchanges x (processor + wire)

The gradient and the codec are timed here, on one worker's batch; the wire is the alpha-beta model of ``engine.network``. The loop
does not overlap the two. Bits are the closed form of every dry run. docs/scaling.md says how far this reaches.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from xutrain.data.base import Batch, Task
from xutrain.engine.context import Context
from xutrain.engine.meter import BitMeter
from xutrain.engine.network import Link
from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.loops import data_parallel
from xutrain.methods.codecs import fast
from xutrain.methods.codecs.base import Codec
from xutrain.methods.exchange import Exchange

_PATIENCE_S = 20.0
_SAMPLE = 1 << 22  # elements on which a codec is timed; longer vectors take proportionally longer


class Seat(Workers):
    """N workers seen from the first one, which talks to nobody: enough to build a method and to ask for its bits."""

    def __init__(self, count: int, reduction: Any = "exact") -> None:
        super().__init__(count, 0, 1, reduction)
        self.hosted = range(1)

    def gather(self, tensors: Any, *, sizes: Any = None) -> list[Any]:
        return [tensors[0]] * self.count


@dataclass
class Alone(Context):
    """A context in which one worker of N is built, however many there are."""

    def workers(self, count: int, reduction: Any = "exact") -> Workers:
        return Seat(count, reduction)


def step_time(recipe: Any, link: Link, compute_s: float | None = None) -> dict[str, Any]:
    """Seconds of a mean step of ``recipe`` on ``link``, its parts, the same in fp32, and where compression begins to pay.

    Args:
        recipe: of a data-parallel verb, ``workers`` as wanted.
        compute_s: time of one gradient, where it is known from another machine (a GPU); None: timed here.
    """
    torch.set_num_threads(recipe.threads)
    ctx = Alone(recipe.seed, device=_device())
    job, absent = data_parallel.outlined(recipe, ctx)
    length, count, exchange = job.replica.numel, recipe.workers, job.exchange
    predicted = data_parallel.forecast(recipe, ctx)
    up, _ = exchange.bits(length)
    buffers = predicted.details["parts"].get("buffers", {"up": 0})["up"]
    often = (predicted.up - buffers) / (predicted.steps * up) if up else 0.0
    encode, decode = codec_seconds(exchange.codec, length, ctx.device)
    gradient = compute_s if compute_s is not None else _gradient_seconds(recipe, ctx, job)
    processor, wire = often * exchange.processor(encode, decode), often * exchange.seconds(length, link)
    shared = buffers / (predicted.steps * count)  # batch-norm statistics, gathered
    wire += link.allgather(shared, count) if shared and count > 1 else 0.0
    full = link.allreduce(32.0 * length, count) if count > 1 else 0.0
    step = gradient + processor + wire
    free = Link(1.0, 0.0)  # seconds at one bit per second: bits
    saved = free.allreduce(32.0 * length, count) - often * exchange.seconds(length, free) if count > 1 else 0.0
    return {
        "workers": count,
        "bandwidth": link.bandwidth,
        "latency_s": link.latency,
        "gradient_s": gradient,
        "gradient": "given" if compute_s is not None else "timed here" + (", on random inputs" if absent else ""),
        "codec_s": processor,
        "wire_s": wire,
        "step_s": step,
        "epoch_s": step * job.steps_per_epoch,
        "fp32_all_reduce_step_s": gradient + full,
        "speed_up": (gradient + full) / step,
        "break_even_bandwidth": _break_even(saved, processor),
        "exchanges_per_step": often,
    }


def _break_even(saved_bits: float, extra_s: float) -> float | None:
    """Bits per second below which saving ``saved_bits`` is worth ``extra_s``; None where it never is."""
    if saved_bits <= 0:
        return None
    return saved_bits / extra_s if extra_s > 0 else math.inf


def break_even(codec: Codec, length: int, count: int, encode: float, decode: float, link: Link) -> dict[str, Any]:
    """How ``count`` workers would exchange through ``codec`` on ``link``, and the bandwidth below which that beats fp32.

    A codec is compared with a ring all-reduce in fp32, without overlap with the backward pass.
    """
    from xutrain.methods.exchange import choose

    mode, reduction = choose(codec, length, count, link)
    exchange = Exchange(Workers(count, 0, 1, reduction), codec, BitMeter(), mode)
    extra = 0.0 if codec.dense else exchange.processor(encode, decode)
    free = Link(1.0, 0.0)
    saved = free.allreduce(32.0 * length, count) - exchange.seconds(length, free)
    way = "all-reduce" if exchange.sums else {"allgather": "all-gather", "alltoall": "all-to-all"}[mode]
    found: dict[str, Any] = {
        "exchange": way,
        "codec_s": extra,
        "wire_s": exchange.seconds(length, link),
        "bits_per_element": codec.payload_bits(length) / length,
    }
    found["exchange_s"] = found["codec_s"] + found["wire_s"]
    found["fp32_s"] = link.allreduce(32.0 * length, count)
    found["break_even_bandwidth"] = None if codec.dense else _break_even(saved, extra)
    return found


def codec_seconds(codec: Codec, length: int, device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """(encode, decode) of a vector of ``length`` elements: medians, the compiled kernels loaded."""
    if codec.dense or codec.collective or not length:
        return 0.0, 0.0
    fast.load()
    size = min(length, _SAMPLE)
    layout, codec.layout = codec.layout, codec.layout if size == length else ()
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    key = Key(0, "foresee")
    payload = codec.encode(vector, key)
    codec.decode(payload)  # to warm up
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        began = _clock(device)
        payload = codec.encode(vector, key)
        between = _clock(device)
        codec.decode(payload)
        times[0].append(between - began)
        times[1].append(_clock(device) - between)
    codec.layout = layout
    return statistics.median(times[0]) * length / size, statistics.median(times[1]) * length / size


def _gradient_seconds(recipe: Any, ctx: Context, job: data_parallel.Job) -> float:
    """Median time of one worker's gradient; where a single one takes long, that one."""
    if type(job.task) is Task:  # sizes only: any numbers of the right shape take the same time
        inputs = torch.randn(recipe.train.batch_size, *job.task.input_shape)
        targets = torch.randint(job.task.num_classes, (recipe.train.batch_size,))
        job.task.draw = lambda *_: Batch(inputs, targets)  # type: ignore[method-assign, assignment]
    times: list[float] = []
    while len(times) < 8 and sum(times) < _PATIENCE_S:
        began = _clock(ctx.device)
        data_parallel.gradient(recipe, ctx, job, 0, 0, len(times))
        times.append(_clock(ctx.device) - began)
    return statistics.median(times[2:] if len(times) > 4 else times)


def _device() -> torch.device:
    import os

    return torch.device("cuda" if torch.cuda.is_available() and os.environ.get("XUTRAIN_DEVICE", "cuda") != "cpu" else "cpu")


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
