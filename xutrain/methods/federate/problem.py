"""What a method may ask a client for: gradients and scores on the client's own data. Vectors are flat."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class Problem(Protocol):
    """What a client knows: its own data and loss. Vectors are flat, of the model's number of parameters."""

    def gradient(self, point: Tensor, step: int) -> Tensor:
        """Gradient at ``point`` on the minibatch of local step ``step`` of this round; owned by the caller until the next call."""
        ...

    def full_gradient(self, point: Tensor) -> Tensor:
        """Gradient at ``point`` of the mean loss over all the client's samples; leaves running statistics as they were."""
        ...

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        """Metrics of ``point`` on the client's own held-out samples."""
        ...


@runtime_checkable
class Validated(Protocol):
    """A problem with held-out samples to learn from (not of the model: of how models are weighed)."""

    def validation_gradient(self, point: Tensor) -> Tensor:
        """Gradient at ``point`` of the mean loss over the client's held-out samples."""
        ...


@runtime_checkable
class Networked(Protocol):
    """A problem with further networks."""

    def of(self, name: str) -> Problem:
        """The same client's problem for the network ``name``."""
        ...


@runtime_checkable
class Confident(Protocol):
    """A problem of telling clients apart."""

    def confidence(self, point: Tensor, split: str = "val") -> Tensor:
        """Probability that ``point`` gives to this client for each of its own samples, shape (n,)."""
        ...


@runtime_checkable
class Teachable(Protocol):
    """A problem whose loss may have a teacher."""

    def taught_gradient(self, point: Tensor, teacher: Tensor, step: int) -> Tensor:
        """As ``gradient``, of the loss plus KL(teacher's prediction || the student's), the teacher held fixed."""
        ...
