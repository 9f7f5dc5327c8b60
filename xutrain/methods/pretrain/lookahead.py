"""Plain averaging of local steps, and Lookahead, which goes a part of the way to the average.

    local_adamw   x_{t+1} = mean_i x^i
    lookahead     x_{t+1} = (1 - alpha) x_t + alpha mean_i x^i

x^i is where local steps took worker i from x_t.

Limits: alpha = 1 is averaging (Local AdamW, Local SGD); with one worker Lookahead is the original of arXiv 1907.08610; with one
local SGD step averaging is data-parallel SGD.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions
from xutrain.registry import method


@method(
    "pretrain", "local_adamw", summary="baseline: average the workers after every round of local steps", aliases=("local_sgd", "averaging")
)
class LocalAdamW(LocalSteps):
    divided = False

    class Options(RoundOptions):
        pass

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        x.sub_(delta)


@method("pretrain", "lookahead", paper="1907.08610", summary="baseline: go a part of the way to the average of the workers")
class Lookahead(LocalSteps):
    divided = False

    class Options(RoundOptions):
        alpha: float = Field(0.5, gt=0, le=1, description="part of the way; 1 is plain averaging")

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        x.sub_(delta, alpha=self.options.alpha)
