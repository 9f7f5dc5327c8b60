"""Full precision, the reference of every table, and its two 16-bit forms.

    fp:    Q(v) = v
    fp16:  Q(v) = the float16 nearest to v, v clamped to +-65504
    bf16:  Q(v) = the bfloat16 nearest to v, v clamped to +-3.39e38

Limits: fp is the identity. fp16 and bf16 are biased, and exact for values with at most 11 and 8 significant bits in their range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.registry import Named, codec


class Plain(Codec):
    """Every element by itself in a floating-point type; n times its width on the wire."""

    dtype = torch.float32

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        vector = as_vector(vector)
        check_finite(vector, max(1, vector.numel()))
        if self.dtype != torch.float32:
            bound = torch.finfo(self.dtype).max
            vector = vector.clamp(-bound, bound)  # saturates instead of overflowing to infinity
        data = vector.to(self.dtype, copy=True).view(torch.uint8) if vector.numel() else vector.new_empty(0, dtype=torch.uint8)
        return Payload(data, vector.numel())

    def decode(self, payload: Payload) -> Tensor:
        data = self.received(payload)
        return data.view(self.dtype).to(torch.float32, copy=True) if payload.length else data.float()

    def payload_bits(self, length: int) -> int:
        return 8 * self.dtype.itemsize * length


@codec("fp", summary="baseline: full precision, 32 bits per element")
class FP(Plain):
    """The identity."""

    contractive = True
    dense = True

    class Options(Named):
        name: str = "fp"


@codec("fp16", summary="baseline: IEEE half precision, 16 bits per element")
class FP16(Plain):
    """Rounded to nearest; values beyond 65504 saturate and those up to 3e-8 vanish."""

    biased = True
    dtype = torch.float16

    class Options(Named):
        name: str = "fp16"


@codec("bf16", summary="baseline: bfloat16, 16 bits per element")
class BF16(Plain):
    """Rounded to nearest, 8 significant bits over the whole range of float32."""

    biased = True
    contractive = True
    dtype = torch.bfloat16

    class Options(Named):
        name: str = "bf16"
