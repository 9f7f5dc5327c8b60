"""One module as flat vectors: parameters, gradients, buffers. A worker's copy is a vector, not a module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """Where a tensor lies in a flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Replica:
    """A module whose parameters can be pointed at any flat float32 vector, without copying.

    Attributes:
        module: the module.
        layout: one Slice per trainable parameter, in the module's order (tied weights once).
        numel: D, the number of trainable parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        everyone = list(module.named_parameters(remove_duplicate=False))
        self._aliases = {name: [other for other, q in everyone if q is p] for name, p in self._parameters}
        self.layout = _slices([(n, p) for n, p in self._parameters])
        self.numel = self.layout[-1].stop if self.layout else 0
        self._buffers = [(n, b) for n, b in module.named_buffers() if b.is_floating_point() and b.numel()]
        self.buffer_layout = _slices(self._buffers)
        self._counters = [b for n, b in module.named_buffers() if n.endswith("num_batches_tracked")]
        self.num_buffer_elements = self.buffer_layout[-1].stop if self.buffer_layout else 0

    def read(self) -> Tensor:
        """A copy of the parameters, float32 of shape (D,)."""
        return torch.cat([p.detach().reshape(-1).float() for _, p in self._parameters])

    def point(self, vector: Tensor) -> None:
        """Make the parameters views of ``vector`` (shape (D,)); later changes of the vector are seen by the module."""
        for (_, parameter), part in zip(self._parameters, self.layout, strict=True):
            parameter.data = vector[part.start : part.stop].view(part.shape)

    def zero_grad(self) -> None:
        for _, parameter in self._parameters:
            parameter.grad = None

    def grad(self) -> Tensor:
        """The gradients as one new vector of shape (D,); zero where a parameter took no part."""
        parts = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for _, p in self._parameters]
        return torch.cat(parts)

    def buffers(self) -> Tensor:
        """The floating-point buffers (batch-norm statistics) as one vector."""
        if not self._buffers:
            return torch.empty(0)
        return torch.cat([b.detach().reshape(-1).float() for _, b in self._buffers])

    def load_buffers(self, vector: Tensor, passes: int = 0) -> None:
        """Take statistics back, and set batch norm's count of batches to ``passes``.

        The module's own count goes up with every worker that this process computes; what it should say is how many
        batches one worker has seen.
        """
        for (_, buffer), part in zip(self._buffers, self.buffer_layout, strict=True):
            buffer.copy_(vector[part.start : part.stop].view(part.shape))
        for counter in self._counters:
            counter.fill_(passes)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The module's state dict with the parameters taken from ``vector``: what a checkpoint or an export holds."""
        state = {name: value.detach() for name, value in self.module.state_dict().items()}
        for part in self.layout:
            value = vector[part.start : part.stop].view(part.shape)
            state.update({name: value for name in self._aliases[part.name]})  # a tied weight has several names
        return state


def _slices(named: list[tuple[str, Tensor]]) -> list[Slice]:
    slices, at = [], 0
    for name, tensor in named:
        slices.append(Slice(name, tuple(tensor.shape), at, at + tensor.numel()))
        at += tensor.numel()
    return slices


def clip_norm(grad: Tensor, limit: float | None) -> Tensor:
    """``grad`` scaled in place to an L2 norm of at most ``limit``."""
    if limit is not None:
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
        if norm > limit:
            grad.mul_(limit / norm)
    return grad
