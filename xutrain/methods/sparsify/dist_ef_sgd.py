"""dist-EF-SGD with momentum (Zheng, Huang, Kwok, arXiv 1905.10936): Nesterov look-ahead, both directions compressed.

    g = gradient at x + wd x;   m^k <- mu m^k + g;   e^k <- e^k + lr (mu m^k + g)
    sent: C(e^k), e^k <- e^k - C(e^k);   server: r = s + mean_k C(e^k), answers c = C(r), s <- r - c;   x <- x - c

The original keeps e in gradient units and multiplies it by lr_before / lr; a codec with C(a v) = a C(v), as its scaled sign
with one block per tensor is (``codec: {name: scaled_sign, scope: tensor}``), gives the same numbers in parameter units.

Limits: without momentum it is EF with ``two_way``; with momentum, EF with ``two_way`` and ``optimizer.nesterov``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from xutrain.methods.sparsify.base import Feedback, FeedbackOptions
from xutrain.registry import method


@method(
    "sparsify", "dist_ef_sgd", paper="1905.10936", summary="baseline: two-way error feedback, Nesterov momentum", aliases=("dist_ef_sgdm",)
)
class DistEFSGD(Feedback):
    class Options(FeedbackOptions):
        name: str = "dist_ef_sgd"
        two_way: bool = Field(True, description="The server compresses its answer with the same codec.")
        average_every: Literal[0] = Field(0, description="Not part of this method.")
        local_optimizer: Literal["sgd"] = Field("sgd", description="Nesterov's look-ahead is this method's own.")

    def update(self, slot: int, grad: Tensor) -> Tensor:
        o = self.setup.optimizer
        if o.weight_decay:
            grad.add_(self.work[slot], alpha=o.weight_decay)
        self.velocity[slot].mul_(o.momentum).add_(grad)
        return grad.add_(self.velocity[slot], alpha=o.momentum)
