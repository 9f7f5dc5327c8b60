"""When things happen: the max-plus time model of a pipeline, its steady state in closed form, and stragglers.

T_k(n) = d_k + max(T_k(n-1), T_{k-1}(n-p_{k-1}) + c, T_{k+1}(n-q_k) + c): an iteration of stage k starts when the one before
is done and both messages are here. d_k seconds of an iteration, c seconds of a transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xutrain.methods.pipeline.base import PipelineMethod
from xutrain.recipe.delays import Delays


def law(delays: Delays, d: Sequence[float], c: float = 0.0) -> float:
    """Steady seconds per batch: max(max_k d_k, max_k (d_k + d_{k+1} + 2c) / (p_k + q_k)).

    Exact for messages that leave at the end of an iteration. Limit: many ticks of delay leave the slowest stage alone.
    """
    pairs = [(d[k] + d[k + 1] + 2 * c) / (delays.p[k] + delays.q[k]) for k in range(delays.stages - 1)]
    return max([*d, *pairs])


def simulate(
    delays: Delays,
    d: Sequence[float],
    c: float = 0.0,
    iterations: int = 1000,
    factor: Callable[[int, int], float] | np.ndarray | None = None,
    since: int | None = None,
) -> float:
    """Mean seconds per iteration of the last stage after the first ``since`` (half of ``iterations``), by the recurrence.

    Args:
        factor: how much longer stage k takes in iteration n, as a function (k, n) or an array of shape (K, iterations).
    """
    stages, p, q = delays.stages, delays.p, delays.q
    done = np.zeros((stages, iterations + 1))
    for n in range(1, iterations + 1):
        for k in range(stages):  # p, q >= 1: every other time is of an earlier iteration
            start = done[k, n - 1]
            if k > 0 and n - p[k - 1] > 0:
                start = max(start, done[k - 1, n - p[k - 1]] + c)
            if k < stages - 1 and n - q[k] > 0:
                start = max(start, done[k + 1, n - q[k]] + c)
            longer = 1.0 if factor is None else factor(k, n - 1) if callable(factor) else factor[k, n - 1]
            done[k, n] = start + d[k] * longer
    half = iterations // 2 if since is None else since
    return float(done[-1, iterations] - done[-1, half]) / (iterations - half)


def dataflow(
    delays: Delays, forward: Sequence[float], backward: Sequence[float], c: float = 0.0, *, late: bool = True, iterations: int = 200
) -> float:
    """As ``simulate`` with two parts an iteration: the forward's message leaves before the backward part begins.

    ``late``: the error gradient is awaited between the parts. Delays of 0 are allowed (back-propagation, FR, 1F1B).
    """
    stages = delays.stages
    up, down = np.zeros((stages, iterations + 1)), np.zeros((stages, iterations + 1))
    for n in range(1, iterations + 1):
        for k in range(stages):
            start = down[k, n - 1]
            if k > 0 and n - delays.p[k - 1] > 0:
                start = max(start, up[k - 1, n - delays.p[k - 1]] + c)
            if not late and k < stages - 1 and 0 < n - delays.q[k] < n:
                start = max(start, down[k + 1, n - delays.q[k]] + c)
            up[k, n] = start + forward[k]
        for k in reversed(range(stages)):
            start = up[k, n]
            if k < stages - 1 and n - delays.q[k] > 0:
                start = max(start, down[k + 1, n - delays.q[k]] + c)
            down[k, n] = start + backward[k]
    half = iterations // 2
    return float(down[-1, iterations] - down[-1, half]) / (iterations - half)


def units_per_batch(method: PipelineMethod, stages: int) -> float:
    """Steady nominal units per batch of equal stages without transfers: forward 1, recomputation 1, backward 2."""
    if method.flush is not None:
        m = method.options.micro_batches
        return float((m + stages - 1) / m * (4 if method.options.recompute else 3))
    forward, backward = method.cost
    return round(dataflow(method.delays, [float(forward)] * stages, [float(backward)] * stages, late=method.late), 6)


def straggler_factors(stages: int, iterations: int, probability: float, slowdown: float, seed: int) -> np.ndarray:
    """Factors 1 or 1 + s of shape (K, iterations), independent with a probability."""
    draw = np.random.default_rng(seed).random((stages, iterations)) < probability
    return 1.0 + slowdown * draw


def slowdown_percent(
    delays: Delays, probability: float, slowdown: float, *, iterations: int = 4000, seeds: Sequence[int] = (0, 1, 2)
) -> float:
    """How much longer a batch takes with stragglers than without, in percent: equal stages, no transfers, mean over seeds."""
    times = [
        simulate(delays, [1.0] * delays.stages, 0.0, iterations, straggler_factors(delays.stages, iterations, probability, slowdown, s))
        for s in seeds
    ]
    return 100 * (float(np.mean(times)) - 1)


def barrier_percent(stages: int, probability: float, slowdown: float) -> float:
    """The same where all stages wait for each other in every iteration: s (1 - (1 - pi)^K)."""
    return 100 * slowdown * (1 - (1 - probability) ** stages)
