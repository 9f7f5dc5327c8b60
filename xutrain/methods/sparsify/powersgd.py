"""PowerSGD (Vogels, Karimireddy, Jaggi, arXiv 1905.13727): error feedback with rank-r factors, momentum after the reduction.

    e^k <- e^k + lr g^k;   P = orth(mean_k e^k Q);   Q^k = e^kT P;   Q <- mean_k Q^k;   c = P Q^T;   e^k <- e^k - P Q^kT
    m <- mu m + c / lr + wd x;   x <- x - lr m

e^k, g^k and c stand for one matrix of the model. The arithmetic is PEF's, the messages are codec ``low_rank``'s:
``codec: {name: low_rank, rank: 1}``.

Limits: a rank that no tensor exceeds is SGD, up to the rounding of the orthogonalisation.
"""

from __future__ import annotations

from typing import Any

from xutrain.errors import Issue
from xutrain.methods.codecs.base import Codec
from xutrain.methods.sparsify.pef import PEF
from xutrain.registry import Named, method


@method(
    "sparsify", "powersgd", paper="1905.13727", summary="baseline: PowerSGD with warm start; takes codec low_rank", aliases=("power_sgd",)
)
class PowerSGD(PEF):
    class Options(Named):
        name: str = "powersgd"

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        found = super().unsound(recipe, codec)
        if not codec.collective:
            what = "powersgd sends rank-r factors; error feedback with another codec is method pef"
            found.append(Issue("codec.name", what, codec.options.name, "set codec.name=low_rank codec.rank=1, or method.name=pef"))
        return found
