"""SignSGD: one bit per element and nothing else. A baseline.

    Q(v_i) = 1 where v_i >= 0, else -1
    vote: true:   G_i = 1 where mean_k Q(v_i^k) >= 0, else -1
    vote: false:  G_i = mean_k Q(v_i^k)

G is what the messages of the workers k become. The size of v is not sent: the learning rate is the step.

Limits: biased, and 0 decodes to 1. With one worker ``vote`` changes nothing.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.codecs import packing
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.methods.codecs.rounding import at_least
from xutrain.registry import Named, codec


@codec("signsgd", summary="baseline: signs, with majority vote at the server")
class SignSGD(Codec):
    """Decodes to +1 where v >= 0 and -1 elsewhere, whatever the size of v: the learning rate is the step.

    With ``vote`` the server turns the mean of the signs into its sign, a tie counting as +1.
    """

    biased = True
    expands = True  # where |v| < 1/2, as gradients and updates are

    class Options(Named):
        name: str = "signsgd"
        vote: bool = Field(True, description="Majority vote: the sign of the mean; false averages the signs.")

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        vector = as_vector(vector)
        check_finite(vector, max(1, vector.numel()))
        symbols = packing.room(2, vector.numel(), vector.device)
        at_least(vector, 0.0, symbols[: vector.numel()])
        return Payload(packing.pack(symbols, 2), vector.numel())

    def decode(self, payload: Payload) -> Tensor:
        return packing.unpack(self.received(payload), 2, payload.length).float().mul_(2.0).sub_(1.0)

    def payload_bits(self, length: int) -> int:
        return 8 * packing.packed_bytes(2, length)

    def combine(self, mean: Tensor) -> Tensor:
        return torch.where(mean >= 0, 1.0, -1.0) if self.options.vote else mean

    @property
    def label(self) -> str:
        return "signsgd" if self.options.vote else "signsgd-mean"
