"""What is learnt: where samples come from, what a loss is, what is measured. One file of this folder per kind of data.

A task is asked for batches by (step, worker) or by sample index, never for "the next batch": so a resumed run, or one on
another number of processes, sees the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xutrain.engine.rng import Key


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one forward pass, on the CPU until ``to`` moves them."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))

    def chunks(self, count: int) -> list[Batch]:
        """The batch cut into ``count`` equal parts, for gradient accumulation."""
        if count == 1:
            return [self]
        return [Batch(i, t) for i, t in zip(self.inputs.chunk(count), self.targets.chunk(count), strict=True)]


class Task:
    """A supervised task. A data set's class has ``Options`` and a static ``build(options, seed) -> Task``.

    Attributes:
        name: the data set's name.
        synthetic: True when the samples are generated; every result then says so.
        input_shape: shape of one input, without the batch dimension.
        num_classes: number of classes (or of outputs).
        num_train: number of training samples.
        labels: int64 of shape (num_train,) where the task has classes (partitions need it), else None.
        sites: int64 of shape (num_train,), the natural owner of each sample (hospital, writer), else None.
        held_out: bool of shape (num_train,), the samples that the source itself sets aside for validation, where it does.
        watched, measured: splits that are evaluated during a run, and at its end.
    """

    name: str
    synthetic: bool = False
    input_shape: tuple[int, ...]
    num_classes: int
    num_train: int
    labels: Tensor | None = None
    sites: Tensor | None = None
    held_out: Tensor | None = None
    watched: tuple[str, ...] = ("test",)
    measured: tuple[str, ...] = ("train", "test")

    def batch(self, indices: Tensor, key: Key) -> Batch:
        """Training samples ``indices`` (int64, shape (b,)), augmented with randomness of ``key``."""
        raise NotImplementedError

    def plain(self, indices: Tensor) -> Batch:
        """Training samples ``indices`` as they are, for measuring on some of them; tasks that augment override this."""
        return self.batch(indices, Key())

    def batches(self, split: str, batch_size: int = 500) -> Iterator[Batch]:
        """All samples of ``split`` ("train" without augmentation, "val" or "test") in a fixed order."""
        raise NotImplementedError

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar; cross entropy by default."""
        return nn.functional.cross_entropy(outputs, batch.targets)

    def score(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Metrics of a batch as (sum, weight): sums over batches divided by weights give the split's value."""
        n = float(len(batch.targets))
        loss = nn.functional.cross_entropy(outputs, batch.targets, reduction="sum")
        hits = (outputs.argmax(dim=1) == batch.targets).sum()
        return {"loss": (float(loss), n), "accuracy": (float(hits), n)}

    def named_scores(self, split: str, scores: dict[str, float]) -> dict[str, float]:
        """The metrics of a split under the names that records use."""
        return {f"{split}_{metric}": value for metric, value in scores.items()}

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """Full batches in one pass; at least one."""
        return max(1, self.num_train // global_batch_size)

    def draw(self, step: int, worker: int, workers: int, batch_size: int, seed: int) -> Batch:
        """The batch of ``batch_size`` samples that ``worker`` of ``workers`` uses at ``step``.

        One keyed permutation per epoch over all workers; worker w takes the w-th slice of the global batch.
        """
        steps = self.steps_per_epoch(workers * batch_size)
        epoch, at = divmod(step, steps)
        first = (at * workers + worker) * batch_size
        order = self._order(epoch, seed)
        indices = order[torch.arange(first, first + batch_size) % self.num_train]
        return self.batch(indices, Key(seed, "augment", step, worker))

    def _order(self, epoch: int, seed: int) -> Tensor:
        if getattr(self, "_epoch", None) != (epoch, seed):
            self._permutation = torch.randperm(self.num_train, generator=Key(seed, "order", epoch).generator())
            self._epoch = (epoch, seed)
        return self._permutation
