"""FDG: fully decoupled training with gradient shrinking (Zhuang et al.; code ZHUANGHP/FDG).

    h_{k+1} = F_k(h_k; w_k^s),    s = max(0, b - m_k)
    G_k(b) = beta^(K-1-k) (dF_k/dw_k at (h_k, w_k^s))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k^s))^T g_{k+1}
    w_k^{b+1} = step(w_k^b, G_k(b))

DSP's time table with the graphs kept (w_k^v as in DSP), and stage k's gradient multiplied by shrink^(K-1-k), shrink = beta (the
exponent is from memory of the paper, not seen). What goes down is not shrunk. ``mix`` takes the Jacobian at w_k^b, as in DDG.

Limits: one stage is back-propagation; with shrink 1, lr = 0 gives exactly the gradient of back-propagation.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from xutrain.methods.pipeline.base import Stage
from xutrain.methods.pipeline.ddg import Stash
from xutrain.recipe.delays import Delays, dsp
from xutrain.registry import Named, method


@method("pipeline", "fdg", paper="1906.09108", summary="fully decoupled, graphs kept, gradients of lower stages shrunk")
class FDG(Stash):
    class Options(Named):
        name: str = "fdg"
        p: list[int] | None = Field(None, description="forward delays in ticks, one per stage, the last 0; default all 1")
        m: list[int] | None = Field(None, description="staleness of each stage, the last 0; default the smallest valid")
        shrink: float = Field(0.5, gt=0, le=1, description="beta: stage k's gradient is multiplied by beta^(K-1-k); 1 is none")
        mix: bool = Field(False, description="old activations with new weights in the Jacobian")

        def delays(self, stages: int) -> Delays:
            return dsp(self.p, None, self.m, stages)

    def __init__(self, options: Any, stages: int) -> None:
        super().__init__(options, stages)
        self.mix = options.mix

    def backward(self, stage: Stage, f: int | None, b: int | None, g: Tensor | None) -> Tensor | None:
        down = super().backward(stage, f, b, g)
        power = stage.count - 1 - stage.index
        if b is not None and power and self.options.shrink != 1:
            for parameter in stage.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.options.shrink**power)  # the update only; what went down is not shrunk
        return down
