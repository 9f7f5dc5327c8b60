"""`xutrain pipeline plan`: measure layers and transfers, predict seconds per batch, search cut points and (p, q)."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xutrain import registry
from xutrain.engine.context import Context
from xutrain.engine.partition import balanced, cut, layer_seconds, layers_of
from xutrain.engine.transfer import message_seconds
from xutrain.errors import Issue, UsageError
from xutrain.loops.pipeline_job import Job, build
from xutrain.methods.pipeline.timing import dataflow, law
from xutrain.recipe.delays import Delays, dsp

_CUTS = 20_000  # partitions that are tried one by one


@dataclass(frozen=True)
class Prediction:
    """One configuration and what it should cost.

    Attributes:
        bounds: first layer of every stage, and the number of layers.
        forward, backward: seconds of one iteration's two parts, by stage (recomputation and update count as backward), with what the
            stage's messages cost its processor.
        message: processor seconds of one end of a message at the widest boundary.
        transfer: seconds that it is on its way beside.
        stored: bytes of inputs that each stage keeps.
        seconds: predicted seconds per batch on ``processes`` processes and ``cores`` cores.
    """

    delays: Delays
    bounds: list[int]
    forward: list[float]
    backward: list[float]
    message: float
    transfer: float
    stored: list[int]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "delays": {"p": list(self.delays.p), "m": list(self.delays.m)},
            "cuts": self.bounds[1:-1],
            "stage_ms": [1000 * (f + b) for f, b in zip(self.forward, self.backward, strict=True)],
            "message_ms": 1000 * self.message,
            "transfer_ms": 1000 * self.transfer,
            "stored_bytes": self.stored,
            "seconds_per_batch": self.seconds,
        }


def predict(
    delays: Delays, forward: list[float], backward: list[float], c: float, *, processes: int, cores: int, late: bool = True
) -> float:
    """Seconds per batch: the time model where every stage has a core; never less than the work divided by the cores."""
    work = sum(forward) + sum(backward)
    if processes == 1:
        return work
    each = delays.stages // processes
    if each == 1:
        flow = dataflow(delays, forward, backward, c, late=late)
    else:  # several stages a process: the busiest process sets the pace
        flow = max(sum(forward[i : i + each]) + sum(backward[i : i + each]) for i in range(0, delays.stages, each))
    return max(flow, work / min(cores, processes))


def search_delays(d: list[float], c: float, inputs: list[int], memory: int | None, longest: int) -> Delays:
    """The smallest p_k + q_k that make the law's seconds least, within a memory and a staleness bound.

    Adding a tick to the boundary that sets the pace never hurts the others, so one at a time is optimal; ticks that do not
    lower the pace in the end, because a bound stops the search, are not taken.

    Args:
        d: seconds of an iteration by stage.
        c: seconds of a transfer.
        inputs: bytes of one batch's input of each stage; a stage stores (m_k + 1) of them.
        memory: bytes that any stage may store, or None.
        longest: largest m_0.
    """
    stages = len(d)
    ticks = [2] * (stages - 1)
    best, least = _delays(ticks, stages), math.inf
    while stages > 1:
        pace = [(d[k] + d[k + 1] + 2 * c) / ticks[k] for k in range(stages - 1)]
        worst = max(range(stages - 1), key=pace.__getitem__)
        if pace[worst] < least:
            best, least = _delays(ticks, stages), pace[worst]
        if pace[worst] <= max(d) * (1 + 1e-9):
            break
        ticks[worst] += 1
        wider = _delays(ticks, stages)
        if wider.m[0] > longest or (memory is not None and max(stored(wider, inputs)) > memory):
            break
    return best


def _delays(ticks: list[int], stages: int) -> Delays:
    return dsp([math.ceil(t / 2) for t in ticks], [t // 2 for t in ticks], None, stages)


def stored(delays: Delays, inputs: list[int]) -> list[int]:
    """Bytes of inputs that each stage keeps: (m_k + 1) a_k."""
    return [(m + 1) * a for m, a in zip(delays.answers, inputs, strict=True)]


def search_cuts(
    forward: list[float], backward: list[float], stages: int, inputs: list[int] | None = None, memory: int | None = None
) -> list[int]:
    """Cut points with the least slowest stage by measured layer times (DSP's iteration: forward, recomputation, backward).

    Args:
        inputs: bytes of one batch's input of each layer.
        memory: bytes that any stage may store at the smallest staleness; the result is empty where no cut fits.
    """
    costs = [2 * f + b for f, b in zip(forward, backward, strict=True)]
    total = len(costs)

    def fits(block: int, start: int) -> bool:
        return inputs is None or memory is None or (2 * (stages - 1 - block) + 1) * inputs[start] <= memory

    if math.comb(total - 1, stages - 1) > _CUTS:
        return balanced(costs, stages, fits)
    choices = ([0, *inner, total] for inner in itertools.combinations(range(1, total), stages - 1))

    def spread(bounds: list[int]) -> tuple[float, float]:
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
        return max(sums), max(sums) - min(sums)

    return min((c for c in choices if all(fits(k, start) for k, start in enumerate(c[:-1]))), key=spread, default=[])


def input_bytes(layers: list[nn.Module], x: Tensor) -> list[int]:
    """Bytes of each layer's input for the batch ``x``."""
    found = []
    with torch.no_grad():
        for layer in layers:
            found.append(x.nbytes)
            x = layer.eval()(x)
    return found


def stage_seconds(job: Job, repeats: int = 9) -> tuple[list[float], list[float]]:
    """Measured seconds of each stage's (forward, recomputation + backward + update), median of ``repeats``; needs all stages here.

    The stages take turns, as in a run: each finds the caches as another left them. Reading a batch counts where it is read.
    """
    ups: list[list[float]] = [[] for _ in job.stages]
    downs: list[list[float]] = [[] for _ in job.stages]
    for b in range(repeats):
        began = time.perf_counter()
        x = job.batch(b).inputs
        job.drawn.clear()
        for stage, up in zip(job.stages, ups, strict=True):
            h = job.method.forward(stage, b, x)
            now = time.perf_counter()
            up.append(now - began)
            began, x = now, h if h is not None else x
        for stage, down in reversed(list(zip(job.stages, downs, strict=True))):
            g = None if stage.last else torch.ones(job.messages[stage.index].shape) / job.messages[stage.index].shape[0]
            began = time.perf_counter()
            job.method.backward(stage, b, b, g)
            if stage.optimizer is not None:
                stage.optimizer.step()
                stage.optimizer.zero_grad(set_to_none=True)
            down.append(time.perf_counter() - began)
        job.drawn.clear()
    return [statistics.median(t) for t in ups], [statistics.median(t) for t in downs]


def ends(stages: int, processes: int) -> list[int]:
    """Ends of messages in one direction that each stage has in an iteration: one for each neighbour in another process."""
    each = stages // processes
    return [(k > 0 and k % each == 0) + (k < stages - 1 and (k + 1) % each == 0) for k in range(stages)]


def plan(recipe: Any, *, processes: int, cores: int, memory: int | None = None, longest: int | None = None) -> dict[str, Prediction]:
    """The recipe's own prediction ("recipe") and the best found ("plan"): staleness up to ``longest``, ``memory`` bytes of inputs a stage.

    Raises:
        RecipeError, UsageError: a network that cannot be cut so, or bounds that no cut keeps.
    """
    smallest = 2 * (recipe.stages - 1)
    longest = max(12, smallest) if longest is None else longest
    if longest < smallest:
        raise UsageError(Issue("--longest", f"the smallest staleness of {recipe.stages} stages is {smallest}", longest))
    ctx = Context(recipe.seed)
    task = registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    ctx.seed_torch("init")
    module: nn.Module = registry.load("model", recipe.model.name).build(recipe.model, task)
    found = {"recipe": _predict(recipe, None, processes, cores, None, None)}  # refuses what cannot be cut
    layers = layers_of(module)
    sample = task.draw(0, 0, 1, recipe.train.batch_size, recipe.seed)
    times = layer_seconds(layers, sample.inputs)
    cuts = search_cuts([f for f, _ in times], [b for _, b in times], recipe.stages, input_bytes(layers, sample.inputs), memory)
    if not cuts:
        assert memory is not None
        hint = f"the recipe's own stages store up to {max(found['recipe'].stored) / 1e6:.3g} MB; lower train.batch_size or allow more"
        raise UsageError(Issue("--memory-mb", "no cut of the network keeps every stage's inputs within it", memory / 1e6, hint))
    cut(module, recipe.stages, recipe.split.model_copy(update={"cuts": cuts[1:-1]}))  # refuses shared weights
    found["plan"] = _predict(recipe, cuts, processes, cores, memory, longest)
    own = found["recipe"]
    if own.seconds < found["plan"].seconds and own.delays.m[0] <= longest and (memory is None or max(own.stored) <= memory):
        found["plan"] = own
    return found


def _predict(recipe: Any, bounds: list[int] | None, processes: int, cores: int, memory: int | None, longest: int | None) -> Prediction:
    job = build(recipe, Context(recipe.seed), bounds)
    forward, backward = stage_seconds(job)
    widest = max((m.bits for m in job.messages), default=0)
    c, cpu = message_seconds(widest) if processes > 1 and widest else (0.0, 0.0)
    for k, count in enumerate(ends(recipe.stages, processes)):
        forward[k], backward[k] = forward[k] + count * cpu, backward[k] + count * cpu
    c = max(0.0, c - 2 * cpu)
    inputs = [job.batch(0).inputs.nbytes, *(m.bits // 8 for m in job.messages)]
    job.drawn.clear()
    d = [f + b for f, b in zip(forward, backward, strict=True)]
    delays = job.method.delays if longest is None else search_delays(d, c, inputs, memory, longest)
    seconds = predict(
        delays, forward, backward, c, processes=processes, cores=cores, late=recipe.runtime.take == "late" and job.method.late
    )
    return Prediction(delays, job.bounds, forward, backward, cpu, c, stored(delays, inputs), seconds)


def steady_law(prediction: Prediction) -> float:
    """The closed form for the same stages, were messages sent at the end of an iteration."""
    d = [f + b for f, b in zip(prediction.forward, prediction.backward, strict=True)]
    return law(prediction.delays, d, prediction.transfer)
