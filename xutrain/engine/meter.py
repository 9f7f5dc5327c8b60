"""Counts the bits of a run. The communication layer calls it; methods never do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class BitMeter:
    """Totals over all logical workers, by part ("gradient", "buffers", ...).

    ``up`` counts every message once, as the worker that encodes it sends it; ``down`` counts what the workers receive.
    Every process calls ``add`` with the same numbers, so the totals are the same everywhere.
    """

    parts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, part: str, up: int = 0, down: int = 0) -> None:
        counted = self.parts.setdefault(part, [0, 0])
        counted[0] += int(up)
        counted[1] += int(down)

    @property
    def up(self) -> int:
        return sum(p[0] for p in self.parts.values())

    @property
    def down(self) -> int:
        return sum(p[1] for p in self.parts.values())

    def state(self) -> dict[str, list[int]]:
        return {name: list(counted) for name, counted in self.parts.items()}

    def load_state(self, state: dict[str, list[int]]) -> None:
        self.parts = {name: list(counted) for name, counted in state.items()}
