"""DEF: detached error feedback (arXiv 2004.05298), and DEF-A, the same training evaluated at x.

    g = gradient at p^k + wd p^k;   m^k <- mu m^k + g;   e^k <- e^k + lr m^k
    c = mean_k C(e^k);   e^k <- e^k - C(e^k);   x <- x - c;   p^k <- x - lambda e^k
    def:  measured at y = x - mean_k e^k;      def_a:  measured at x

All of e^k is fed back, but the gradient sees a part: (1/K) sum_k ||p^k - y||^2 = lambda^2 V + (1 - lambda)^2 M with M = ||mean e||^2
and V = mean ||e^k - mean e||^2, least at lambda = M / (M + V). ``coeff: adaptive`` (ours) estimates M and V on the block that is
exchanged anyway, with one more number per message. Between exchanges (``period``) p^k moves by -lr m^k; so, with coeff alpha, this is
also SA-PEF (arXiv 2601.20738).

Limits: lambda 0 is EF, 1 is SAEF without averaging, ratio 1 is SGD for every lambda; period P with codec fp is local SGD.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.errors import Issue
from xutrain.methods.base import Setup
from xutrain.methods.codecs.base import Codec
from xutrain.methods.sparsify.base import Feedback, FeedbackOptions
from xutrain.registry import method

_KEEP = 0.95


class Moments:
    """Running M_S and V_S of the exchanged block, from which lambda follows."""

    def __init__(self, common: float = 0.0, spread: float = 0.0) -> None:
        self.now = [common, spread]

    def add(self, common: float, power: float) -> float:
        """lambda after a step with ||mean block||^2 = ``common`` and mean ||block||^2 = ``power``; 1 where there is nothing yet."""
        for i, value in enumerate((common, max(0.0, power - common))):
            self.now[i] = _KEEP * self.now[i] + (1 - _KEEP) * value
        return self.now[0] / sum(self.now) if sum(self.now) > 0 else 1.0


class DetachedOptions(FeedbackOptions):
    """Options of DEF and DEF-A."""

    coeff: float | Literal["adaptive"] = Field(0.3, description="Detach coefficient lambda in [0, 1], or adaptive.")
    eval_point: Literal["y", "x", "local"] = Field("y", description="Point that is saved and measured first.")


@method("sparsify", "def", paper="2004.05298", summary="detached error feedback, measured at the virtual point y", aliases=("sa_pef",))
class DEF(Feedback):
    class Options(DetachedOptions):
        name: str = "def"

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.adaptive = options.coeff == "adaptive"
        self.moments = Moments()

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        found, coeff = super().unsound(recipe, codec), recipe.method.coeff
        if coeff != "adaptive":
            return (
                found
                if 0 <= coeff <= 1
                else [Issue("method.coeff", "must be in [0, 1], or adaptive", coeff, "the paper's value is 0.3"), *found]
            )
        if recipe.method.two_way or not (codec.shared_support or codec.dense):
            what = f"adaptive needs messages that all hold the same coordinates, which those of {codec.label} do not"
            found.append(Issue("method.coeff", what, coeff, "set codec.name=random_block, or a number in [0, 1]"))
        return found

    def send(self, key: Any) -> Tensor:
        fed = self.setup.exchange.feedback(self.error, key, power=self.adaptive)
        if fed.power is not None:
            self.coeff = self.moments.add(float(torch.linalg.vector_norm(fed.mean).square()), fed.power)
        return fed.mean

    def message_bits(self, length: int) -> tuple[int, int]:
        return self.setup.exchange.bits(length, True) if self.adaptive else super().message_bits(length)

    def diagnostics(self) -> dict[str, float]:
        return {**super().diagnostics(), "coeff": self.coeff}

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        shared, workers = super().state()
        return {**shared, "coeff": self.coeff, "moments": list(self.moments.now)}, workers

    def load_state(self, shared: dict[str, Any], worker: Any) -> None:
        super().load_state(shared, worker)
        if self.adaptive:  # a number is the recipe's, which may be another run's that goes on from here
            self.coeff, self.moments = shared["coeff"], Moments(*shared["moments"])


@method("sparsify", "def_a", paper="2004.05298", summary="DEF evaluated at x, which is an average of y's iterates")
class DEFA(DEF):
    class Options(DetachedOptions):
        name: str = "def_a"
        eval_point: Literal["x", "y", "local"] = Field("x", description="Point that is saved and measured first.")
