"""Learning-rate factors as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from xutrain.recipe.schema import Schedule


def factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """What the base learning rate is multiplied by at ``step`` (0 .. total_steps-1)."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch) if schedule.warmup_steps is None else schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "step":
        return float(schedule.gamma ** sum(step >= round(m * total_steps) for m in schedule.milestones))
    done = min(1.0, (step - warmup) / max(1, (schedule.decay_steps or total_steps) - warmup))
    if schedule.name == "cosine":
        return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "linear":
        return schedule.floor + (1 - schedule.floor) * (1 - done)
    return 1.0
