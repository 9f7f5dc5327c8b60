"""What tests look at in a finished job."""

from __future__ import annotations

from typing import Any

import numpy as np


def weights(job: Any) -> np.ndarray:
    return np.concatenate([m.weights for _, m in sorted(job.methods.items())])


def objective(job: Any, l2: float = 0.01) -> float:
    """f of the joint weights."""
    z = sum(m.contribution() for m in job.methods.values())
    return float(job.methods[0].loss.value(z, job.data.y) + 0.5 * l2 * np.square(weights(job)).sum())
