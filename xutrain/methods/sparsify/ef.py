"""EF: error feedback in parameter units, local momentum (baseline of arXiv 2008.05823 and 2004.05298).

    g = gradient at x + wd x;   m^k <- mu m^k + g;   e^k <- e^k + lr m^k
    c = mean_k C(e^k);   e^k <- e^k - C(e^k);   x <- x - c

lambda = 0: the gradient is taken at x, which misses what the worker still holds, e^k. In gradient units this is
g' + (lr_before / lr) e, and the ratio is what parameter units make unnecessary. Between exchanges (``period``) a worker goes on from x
by -lr m^k.

Limits: codec fp, or ratio 1, is SGD with local momenta; period P with codec fp is local SGD.
"""

from __future__ import annotations

from xutrain.methods.sparsify.base import Feedback, FeedbackOptions
from xutrain.registry import method


@method("sparsify", "ef", paper="2008.05823", summary="baseline: error feedback, local momentum", aliases=("ef_sgd", "ef_sgdm"))
class EF(Feedback):
    class Options(FeedbackOptions):
        name: str = "ef"
