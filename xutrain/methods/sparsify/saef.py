"""SAEF: step-ahead error feedback (arXiv 2008.05823).

    g = gradient at p^k + wd p^k;   m^k <- mu m^k + g;   e^k <- e^k + lr m^k
    c = mean_k C(e^k);   e^k <- e^k - C(e^k);   x <- x - c;   p^k <- x - coeff e^k   (coeff 1: step ahead)
    every ``average_every`` exchanges e^k <- mean_j e^j just before a gradient
    two_way:  c = C(r), r = s + mean_k C(e^k);   s <- r - c

y = x - mean_k e^k - s moves by -lr mean_k m^k. ``two_way`` with ``server_residual`` is the form of the paper's CIFAR and ImageNet
runs.

Limits: coeff 0 without averaging is EF; codec fp is SGD; coeff 1, one worker, one-way: y follows SGD exactly, for any codec.
"""

from __future__ import annotations

from pydantic import Field

from xutrain.methods.sparsify.base import Feedback, FeedbackOptions
from xutrain.registry import method


@method("sparsify", "saef", paper="2008.05823", summary="step-ahead error feedback with error averaging, one-way or two-way")
class SAEF(Feedback):
    class Options(FeedbackOptions):
        name: str = "saef"
        coeff: float = Field(1.0, ge=0, le=1, description="Part of its own residual by which a worker steps ahead; below 1 is ours.")
