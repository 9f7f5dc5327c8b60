"""Losses of linear models whose total inner product z is shared out over parties.

Objective of every method here: f(w) = (1/n) sum_i L(z_i, y_i) + (l2/2) sum_l ||w_l||^2, with z_i = sum_l x_{i,l}.w_l.
theta = dL/dz is all that a party needs beside its own features. Everything is float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Loss:
    """A loss of the total z, shape (m,) or (m, classes), and the labels y, shape (m,)."""

    name: str

    def theta(self, z: Array, y: NDArray) -> Array:
        """Derivative dL/dz, the shape of z."""
        raise NotImplementedError

    def value(self, z: Array, y: NDArray) -> float:
        """Mean loss."""
        raise NotImplementedError

    def curvature(self) -> float:
        """Upper bound of the second derivative in z: the step is stable below 1 / (curvature * max ||x||^2 + l2)."""
        raise NotImplementedError


class Logistic(Loss):
    """L = log(1 + exp(-y z)) with y in {-1, +1}; theta = -y sigmoid(-y z). Stable for any |z|."""

    name = "logistic"

    def theta(self, z: Array, y: NDArray) -> Array:
        return -y * sigmoid(-y * z)

    def value(self, z: Array, y: NDArray) -> float:
        return float(np.logaddexp(0.0, -y * z).mean())

    def curvature(self) -> float:
        return 0.25


class Ridge(Loss):
    """L = (z - y)^2 / 2; theta = z - y."""

    name = "ridge"

    def theta(self, z: Array, y: NDArray) -> Array:
        return z - y

    def value(self, z: Array, y: NDArray) -> float:
        return float(0.5 * np.square(z - y).mean())

    def curvature(self) -> float:
        return 1.0


class Softmax(Loss):
    """Cross entropy over classes, y in {0 .. classes-1}; theta = softmax(z) - onehot(y)."""

    name = "softmax"

    def theta(self, z: Array, y: NDArray) -> Array:
        p = softmax(z)
        p[np.arange(len(y)), y] -= 1.0
        return p

    def value(self, z: Array, y: NDArray) -> float:
        top = z.max(axis=1)
        log_sum = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
        return float((log_sum - z[np.arange(len(y)), y]).mean())

    def curvature(self) -> float:
        return 0.5


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)) without overflow."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def softmax(z: Array) -> Array:
    """Rows of probabilities; shape (m, classes)."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


LOSSES: dict[str, type[Loss]] = {"logistic": Logistic, "ridge": Ridge, "softmax": Softmax}
