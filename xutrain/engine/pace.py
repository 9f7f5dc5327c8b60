"""Stages slower than they are: nominal times padded by sleep, and random slow-downs. Numbers do not change, only the clock.

Sleeping processes overlap on any number of cores, so speed-ups and the effect of stragglers can be measured on a laptop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from xutrain.engine.rng import Key
from xutrain.recipe.pipeline import Straggler


def slowed(options: Straggler, stage: int, iteration: int) -> float:
    """1, or 1 + s with the recipe's probability: the factor of one stage in one iteration, the same wherever it is asked."""
    if not options.probability:
        return 1.0
    hit = float(Key(options.seed, "straggler", iteration, stage).uniform(1)) < options.probability
    return 1.0 + options.slowdown * hit


class Pace:
    """Sleeps after a piece of work until its nominal time has passed, or for the slow-down of its own time.

    Args:
        unit_ms: nominal milliseconds of one unit of work (a forward pass is 1); 0 pads nothing.
        straggler: the slow-downs.
    """

    def __init__(self, unit_ms: float, straggler: Straggler) -> None:
        self.unit_s = unit_ms / 1000
        self.straggler = straggler
        self.idle = not unit_ms and not straggler.probability
        self._ahead: dict[int, float] = {}

    @contextmanager
    def beside(self, stage: int) -> Iterator[None]:
        """Reading a batch, or an update: part of the iteration's nominal time, so the next piece of work is padded by that much less."""
        began = time.perf_counter()
        yield
        if self.unit_s:
            self._ahead[stage] = self._ahead.get(stage, 0.0) + time.perf_counter() - began

    @contextmanager
    def work(self, units: float, stage: int, iteration: int) -> Iterator[None]:
        """A piece of ``units`` units of work."""
        if self.idle or not units:
            yield
            return
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        rest = max(spent, units * self.unit_s) * slowed(self.straggler, stage, iteration) - spent - self._ahead.pop(stage, 0.0)
        if rest > 0:
            time.sleep(rest)
