"""Signed Lookahead: the sign of the averaged displacement, a baseline of arXiv 2411.17866.

    x_{t+1} = (1 - eta gamma lambda) x_t - eta gamma sign(D),    D = (1/n) sum_i (x_t - x^i) / gamma

Limits: it is DSM with beta1 = beta2 = 0, and either form of signed SlowMo with beta = 0.
"""

from __future__ import annotations

from torch import Tensor

from xutrain.methods.pretrain.signs import SignOptions, SignSteps
from xutrain.registry import method


@method("pretrain", "signed_lookahead", paper="2411.17866", summary="baseline: the sign of the averaged displacement, no momentum")
class SignedLookahead(SignSteps):
    class Options(SignOptions):
        pass

    def direction(self, delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        return delta
