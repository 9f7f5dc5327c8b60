"""Which codecs and exchanges error feedback survives."""

from __future__ import annotations

from typing import Any

from xutrain.errors import Issue
from xutrain.methods.codecs.base import Codec


def no_feedback_over_shards(recipe: Any, codec: Codec) -> list[Issue]:
    """What no error feedback survives: a second quantization that is not fed back, and a codec that makes errors grow."""
    found = []
    if recipe.exchange.mode == "alltoall":
        what = "alltoall quantizes a second time, and error feedback would not see that error"
        found.append(Issue("exchange.mode", what, "alltoall", "set exchange.mode=allgather"))
    if codec.expands:
        what = f"{codec.label} leaves a residual larger than the vector itself, which error feedback lets grow without bound"
        hint = "set codec.name=scaled_sign" if codec.options.name == "signsgd" else "set codec.rescale=false, or codec.ratio=2"
        found.append(Issue("codec", what, codec.options.name, hint))
    return found


def not_contractive(codec: Codec) -> list[str]:
    """A warning where the codec's residual is not proven to shrink."""
    if codec.contractive or codec.expands:
        return []
    return [f"codec {codec.label} is not contractive for every vector: its residual may grow under error feedback"]
