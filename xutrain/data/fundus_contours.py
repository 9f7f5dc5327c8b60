"""RIGA's ground truth: contours that readers drew into copies of a photograph, made into masks of disc and cup."""

from __future__ import annotations

import numpy as np

#: least difference of a drawn pixel to the photograph, in grey levels, above what JPEG leaves
LEAST = 30
#: thresholds that are tried in turn, as parts of the largest difference: thin lines fade where JPEG halves the colours
SHARES = (0.4, 0.3, 0.2, 0.12)


def trace(prime: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Masks (disc, cup) of one drawing, bool of shape (H, W); None where two nested closed curves cannot be found.

    The difference to the photograph is cut at a threshold and closed; the curves part the picture into outside, rim and cup, and every
    drawn pixel goes to the nearest of them, so that a boundary is the middle of its line.

    Args:
        prime, drawn: uint8 of shape (H, W, 3).
    """
    if prime.shape != drawn.shape:
        raise ValueError(f"a drawing of shape {drawn.shape[:2]} on a photograph of shape {prime.shape[:2]}")
    difference = np.abs(prime.astype(np.int16) - drawn.astype(np.int16)).max(axis=2)
    if difference.max() < LEAST:
        return None
    for share in SHARES:
        found = _nested(difference >= max(LEAST, share * float(difference.max())))
        if found is not None:
            return found
    return None


def _nested(line: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Disc and cup of a picture of two nested closed curves; None when it is not that."""
    from scipy import ndimage

    window = _about(line)
    drawn = ndimage.binary_closing(line[window], iterations=2)
    parts, count = ndimage.label(~drawn)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    inner = sorted((k for k in range(1, count + 1) if k != parts[0, 0]), key=lambda k: -int(sizes[k]))[:2]
    if len(inner) < 2 or sizes[inner[1]] < 0.01 * sizes[inner[0]]:
        return None
    extent = {k: np.ptp(np.argwhere(parts == k), axis=0).max() for k in inner}
    rim, cup = sorted(inner, key=lambda k: -int(extent[k]))
    kept = np.isin(parts, [int(parts[0, 0]), rim, cup])
    nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
    whole = parts[tuple(nearest)]
    disc, inside = np.zeros(line.shape, dtype=bool), np.zeros(line.shape, dtype=bool)
    disc[window], inside[window] = (whole == rim) | (whole == cup), whole == cup
    return disc, inside


def _about(line: np.ndarray) -> tuple[slice, slice]:
    """The window that holds all of the drawing, with a margin that is outside of every curve."""
    rows, columns = np.flatnonzero(line.any(1)), np.flatnonzero(line.any(0))
    return slice(max(0, rows[0] - 8), rows[-1] + 9), slice(max(0, columns[0] - 8), columns[-1] + 9)
