"""Quantized data-parallel SGD (arXiv 2002.11082).

    G = (1/K) sum_k Q(g^k);   m <- mu m + G + wd x;   x <- x - lr m
    error_feedback:  Q(g^k + e^k) is sent;   e^k <- g^k + e^k - Q(g^k + e^k)

g^k is worker k's gradient; weight decay is added after the exchange. ``error_feedback`` is ours, not in the paper; e is in gradient
units: what is held back when lr falls is later applied at the lower rate (the methods of `sparsify` keep it in parameter units
instead).

Limits: codec fp is full-precision data-parallel SGD, with ``error_feedback`` or without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.optim import FlatSGD
from xutrain.errors import Issue
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.codecs.base import Codec
from xutrain.methods.sparsify.soundness import no_feedback_over_shards, not_contractive
from xutrain.registry import Named, method


@method("quantize", "sgd", paper="2002.11082", summary="momentum SGD on the mean of the workers' quantized gradients")
class QuantizedSGD(DataParallel):
    class Options(Named):
        error_feedback: bool = Field(False, description="send what earlier messages left out as well (not in the paper)")

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.optimizer = FlatSGD(setup.optimizer)
        self.error = [torch.zeros_like(self.x) for _ in setup.workers.hosted] if options.error_feedback else []

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        return no_feedback_over_shards(recipe, codec) if recipe.method.error_feedback else []

    def notes(self) -> list[str]:
        return not_contractive(self.setup.exchange.codec) if self.error else []

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        key = self.setup.ctx.key("round", step)
        if self.error:
            for grad, error in zip(grads, self.error, strict=True):
                grad.add_(error)
        result = self.setup.exchange.mean(grads, key, want_sent=bool(self.error))
        for grad, error, sent in zip(grads, self.error, result.sent, strict=False):
            torch.sub(grad, sent, out=error)
        self.optimizer.step(self.x, result.mean, lr)

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        workers = {w: {"error": e} for w, e in zip(self.setup.workers.hosted, self.error, strict=False)}
        return {"x": self.x, "optimizer": self.optimizer.state()}, workers

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.optimizer.load_state(shared["optimizer"])
        self.error = [worker(w)["error"] for w in self.setup.workers.hosted] if self.options.error_feedback else []
