"""What several label holders must know of each other: where everybody is in lock step and at passes, and how fast each one writes."""

from __future__ import annotations

import time
from collections.abc import Iterable


class Rounds:
    """Marks that only rise: how many rounds ("step") and inner loops ("pass") each label holder has come to the end of.

    Marks are repeated in every greeting, so a party that was away, or that goes on from a checkpoint, holds up nobody for ever.
    """

    DONE = 1 << 40

    def __init__(self, others: Iterable[str]) -> None:
        self.marks = {(p, what): 0 for p in others for what in ("step", "pass")}
        self.own = {"step": 0, "pass": 0}
        self._met = {"step": -1, "pass": -1}

    def reach(self, p: str, what: str, mark: int) -> None:
        """Label holder ``p`` has come to the end of ``mark`` rounds."""
        if (p, what) in self.marks:
            self.marks[p, what] = max(self.marks[p, what], mark)

    def finish(self, p: str) -> None:
        """``p`` has taken all its steps: nobody waits for it any more."""
        for what in self.own:
            self.reach(p, what, self.DONE)

    def met(self, what: str, here: int) -> bool:
        """Whether everybody, this party too, is past round ``here``; true once for each."""
        if self._met[what] >= here or self.own[what] <= here or any(m <= here for (_, w), m in self.marks.items() if w == what):
            return False
        self._met[what] = here
        return True


class Rates:
    """How often each label holder asks, by this party's own clock, and the step size that makes up for being slow.

    As in the simulation: lr times own period / shortest period, no longer than the longest stable step of this block.

    Args:
        lr: of the recipe. longest: the block's longest stable step.
    """

    LEAST = 4  # observations before a period counts

    def __init__(self, lr: float, longest: float) -> None:
        self.base, self.longest = lr, max(lr, longest)
        self._seen: dict[str, tuple[float, float, int]] = {}

    def note(self, who: str) -> None:
        """``who`` has taken one more step."""
        now = time.monotonic()
        first, _, count = self._seen.get(who, (now, now, 0))
        self._seen[who] = (first, now, count + 1)

    def lr(self, own: str) -> float:
        """The step size of ``own`` by what was seen so far."""
        periods = {w: (last - first) / (count - 1) for w, (first, last, count) in dict(self._seen).items() if count > self.LEAST}
        if own not in periods or len(periods) < 2:
            return self.base
        return min(max(self.base, self.base * periods[own] / max(1e-9, min(periods.values()))), self.longest)
