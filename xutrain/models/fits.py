"""Does a checkpoint hold what its config.json promises? Asked before any work, so that nothing is found out hours later."""

from __future__ import annotations

from typing import Any

import torch

from xutrain.errors import DataError, Issue
from xutrain.models.decoder import Layer
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source

#: What a weight may be stored as; a number of eight bits means nothing without its scales.
FLOATS = ("F64", "F32", "F16", "BF16")


def promised(arch: Architecture, config: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by on-disk name. ``config``: transformers' object (``attention_config``)."""
    d, ffn = arch.hidden, arch.ffn
    found = {"model.embed_tokens.weight": (arch.vocab, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (arch.vocab, d)
    expert = {"gate": (ffn, d), "up": (ffn, d), "down": (d, ffn)}
    rest: dict[bool, dict[str, tuple[int, ...]]] = {}  # layers are of two kinds at most
    for index in range(arch.layers):
        sparse = arch.has_experts(index)
        if sparse not in rest:
            try:
                with torch.device("meta"):
                    layer = Layer(arch, index, config, experts=False)
            except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as reason:
                what = f"describes no layer that can be built: {type(reason).__name__}: {reason}"
                raise DataError(Issue("config.json", what, has_value=False)) from None
            rest[sparse] = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
        found |= {arch.layer_prefix(index) + name: shape for name, shape in rest[sparse].items()}
        if sparse:
            found |= {arch.expert_name(index, e, role): shape for e in range(arch.experts) for role, shape in expert.items()}
    return found


def check(arch: Architecture, config: Any, source: Source) -> None:
    """Raises DataError for a tensor that is missing, of another shape, not a float, or of a layer that config.json does not have."""
    shapes = promised(arch, config)
    source.need(shapes)
    hint = "does config.json belong to these weights?"
    for name, shape in shapes.items():
        entry = source.entries[name]
        if entry.shape != shape:
            raise DataError(Issue(name, f"has shape {entry.shape} in {entry.file}; config.json says {shape}", has_value=False, hint=hint))
        if entry.dtype not in FLOATS:
            raise DataError(Issue(name, "is not stored as a float that can be pruned", entry.dtype, f"supported: {', '.join(FLOATS)}"))
    known = tuple(arch.layer_prefix(i) for i in range(arch.layers))
    beyond = [n for n in source.entries if n.startswith("model.layers.") and not n.startswith(known) and n.endswith(".weight")]
    if beyond:
        raise DataError(Issue(beyond[0], f"lies beyond the {arch.layers} layers of config.json", has_value=False, hint=hint))
