"""SGD on the mean of compressed gradients without feedback (``va`` and ``va-C`` of arXiv 2008.05823).

    c = mean_k C(g^k + wd x);   m <- mu m + c;   x <- x - lr m

g^k is worker k's gradient at x, C the recipe's codec; what C leaves out is not fed back.

Limits: codec fp, or ratio 1, is full-precision data-parallel momentum SGD, the reference of every table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from xutrain.engine.optim import FlatSGD
from xutrain.methods.base import DataParallel, Setup
from xutrain.registry import Named, method


@method("sparsify", "sgd", summary="baseline: momentum SGD on the mean of the messages, no feedback", aliases=("sgdm",))
class SGD(DataParallel):
    class Options(Named):
        name: str = "sgd"

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.optimizer = FlatSGD(setup.optimizer.model_copy(update={"weight_decay": 0.0}))

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        self.optimizer.step(self.x, self.mean_gradient(grads, self.x, step), lr)

    def mean_gradient(self, grads: list[Tensor], at: Tensor, step: int) -> Tensor:
        """c, with weight decay at ``at`` inside the messages."""
        if self.setup.optimizer.weight_decay:
            for grad in grads:
                grad.add_(at, alpha=self.setup.optimizer.weight_decay)
        return self.setup.exchange.mean(grads, self.setup.ctx.key("round", step)).mean

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        return {"x": self.x, "optimizer": self.optimizer.state()}, {}

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.optimizer.load_state(shared["optimizer"])
