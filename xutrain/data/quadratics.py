"""Clients with quadratic losses of their own: a test-bed on which the cost of client drift is known exactly.

Client k has f_k(w) = 1/2 (w - W_k)' H_k (w - W_k) with H_k = diag(exp U(ln low, ln high)) and W_k ~ N(0, I); f is the mean over the
clients, whose minimiser is known in closed form. A training sample of client k is a draw of noise xi ~ sigma N(0, I), its
gradient H_k (w - W_k) + xi. The metric ``excess`` is f(w) - min f. All clients and the start 5 N(0, I) come from
numpy's default_rng(seed) and default_rng(1000 + seed), as in the measurements of docs/federate-auto-fedrl.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xutrain.data.base import Batch, Task
from xutrain.engine.rng import Key
from xutrain.registry import Named, dataset


@dataset("quadratics", summary="one quadratic loss per client with gradient noise; the optimum is known (generated)", verbs=("federate",))
class Quadratics:
    """Sites are the clients: use ``partition: by_site`` and the model ``point``."""

    class Options(Named):
        name: str = "quadratics"
        clients: int = Field(8, ge=1, description="Clients K.")
        dim: int = Field(20, ge=1, description="Dimension of w.")
        low: float = Field(0.1, gt=0, description="Least curvature.")
        high: float = Field(10.0, gt=0, description="Greatest curvature.")
        noise: float = Field(0.3, ge=0, description="Standard deviation of the gradient noise, sigma.")
        homogeneous: bool = Field(False, description="All W_k equal: there is no drift, more local work is better.")
        samples_per_client: int = Field(10, ge=1, description="Samples of each client; they differ in their noise only.")
        data_seed: int | None = Field(None, ge=0, description="Seed of the clients and of the start; null: the run's seed.")

    @staticmethod
    def build(options: Options, seed: int) -> QuadraticTask:
        return QuadraticTask(options, seed if options.data_seed is None else options.data_seed)


class QuadraticTask(Task):
    """The task; inputs are noise vectors (b, dim), targets client numbers (b,), outputs w once per sample (b, dim)."""

    def __init__(self, options: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (options.clients, options.dim)
        self.curvature = np.exp(rng.uniform(np.log(options.low), np.log(options.high), shape))
        self.centre = rng.standard_normal(shape)
        if options.homogeneous:
            self.centre = np.broadcast_to(self.centre[:1], shape).copy()
        best = (self.curvature * self.centre).sum(0) / self.curvature.sum(0)
        self.minimum = float((0.5 * self.curvature * (best - self.centre) ** 2).sum(1).mean())
        self.start = torch.from_numpy(5 * np.random.default_rng(1000 + seed).standard_normal(options.dim)).float()
        self.name, self.synthetic, self.noise = "quadratics", True, options.noise
        self.input_shape, self.num_classes = (options.dim,), options.clients
        self.num_train = options.clients * options.samples_per_client
        self.sites = torch.arange(options.clients).repeat_interleave(options.samples_per_client)
        self._h, self._w = torch.from_numpy(self.curvature).float(), torch.from_numpy(self.centre).float()

    def batch(self, indices: Tensor, key: Key) -> Batch:
        xi = torch.randn(len(indices), *self.input_shape, generator=key.fold(stream="noise").generator()) * self.noise
        return Batch(xi, self._owner(indices))

    def plain(self, indices: Tensor) -> Batch:
        return Batch(torch.zeros(len(indices), *self.input_shape), self._owner(indices))

    def _owner(self, indices: Tensor) -> Tensor:
        assert self.sites is not None
        return self.sites[indices]

    def batches(self, split: str, batch_size: int = 500) -> Iterator[Batch]:
        for rows in torch.arange(self.num_classes).split(batch_size):
            yield Batch(torch.zeros(len(rows), *self.input_shape), rows)

    def _values(self, outputs: Tensor, batch: Batch) -> Tensor:
        """f_k(w) of every sample, shape (b,)."""
        h, w = self._h.to(outputs.device)[batch.targets], self._w.to(outputs.device)[batch.targets]
        return 0.5 * (h * (outputs - w) ** 2).sum(1)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        return (self._values(outputs, batch) + (batch.inputs * outputs).sum(1)).mean()

    def score(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        n, total = float(len(batch)), float(self._values(outputs, batch).double().sum())
        return {"loss": (total, n), "excess": (total - n * self.minimum, n)}
