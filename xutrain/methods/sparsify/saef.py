"""SAEF: step-ahead error feedback (arXiv 2008.05823).

    p^k = x - coeff e^k (coeff 1: step ahead);   every ``average_every`` exchanges e^k <- mean_j e^j just before a gradient

Limits: coeff 0 without averaging is EF; one worker, one-way: y follows SGD exactly, for any codec. ``two_way`` with
``server_residual`` is the form of the paper's CIFAR and ImageNet runs.
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
