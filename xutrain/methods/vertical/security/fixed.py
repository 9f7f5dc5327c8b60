"""Real numbers in the ring of 64-bit integers: value = round(z 2^32), sums wrap around, uniform masks hide perfectly.

Error of one number 2^-33, of a sum of q numbers q 2^-33. Range: each summand must be below 2^30 in size, so that a sum of two
cannot wrap; with q summands the total stays below q 2^30, hence the tighter bound 2^31 / q for q > 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xutrain.errors import Diverged, Issue

Ring = NDArray[np.uint64]
SCALE = 2.0**32
ERROR = 2.0**-33  #: largest rounding error of one encoded number


def encode(values: NDArray[np.float64], parties: int) -> Ring:
    """Fixed-point ring elements, the shape of ``values``. Raises Diverged where a value is out of range; nothing wraps silently."""
    bound = min(2.0**30, 2.0**31 / parties)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest < bound:  # also NaN
        raise Diverged(
            Issue(
                "security",
                f"a partial product is outside the range of the masks (+-{bound:.0f})",
                largest,
                "lower train.lr, or scale the features",
            )
        )
    return np.rint(values * SCALE).astype(np.int64).view(np.uint64)


def decode(ring: Ring) -> NDArray[np.float64]:
    """The numbers that ring elements stand for."""
    return ring.view(np.int64).astype(np.float64) / SCALE
