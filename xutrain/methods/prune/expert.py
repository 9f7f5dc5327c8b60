"""One expert from dense to pruned: its statistics, its cut, its repair, its output. Nothing else is in memory.

Every sum runs over the expert's tokens in rising order, in chunks of fixed size; so the result does not depend on which
process computes the expert, or on whether the run was interrupted before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import DataError, Issue
from xutrain.methods.prune.base import ROLES, Chunk, Cut, Expert, Routing, Tokens, WeightMethod, magnitude_cut
from xutrain.methods.prune.masks import Pattern, keep, kept
from xutrain.methods.prune.rescale import RowScales


@dataclass(frozen=True)
class Row:
    """What the report says of one expert.

    tokens: calibration tokens routed to it; mass: sum of their router weights (None when cut from cached sums);
    fallback: too few tokens, cut by magnitude;
    sparsity: share of its weights dropped; error: ||g (E - E')|| / ||g E|| over its routed tokens, None without tokens.
    """

    layer: int
    expert: int
    tokens: int
    mass: float | None
    fallback: bool
    sparsity: float
    error: float | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Outcome:
    """Pruned matrices in the stored dtype, the gated output of the routed tokens (t, d), the sums, the report's row, and how many
    tokens the method counted."""

    matrices: dict[str, Tensor]
    masks: dict[str, Tensor]
    output: Tensor
    sums: dict[str, Tensor]
    row: Row
    counted: int


def chunks(expert: Expert, x: Tensor, tokens: Tokens, size: int) -> Iterator[Chunk]:
    """The chosen tokens inside an expert, ``size`` at a time."""
    for start in range(0, len(tokens.index), size):
        z = x[tokens.index[start : start + size]]
        yield Chunk(z, tokens.weight[start : start + size].to(z.dtype), *expert.inner(z))


def gated_output(expert: Expert, x: Tensor, tokens: Tokens, size: int) -> Tensor:
    """g E(x) for the chosen tokens, (t, d)."""
    out = x.new_empty(len(tokens.index), x.shape[1])
    for start in range(0, len(out), size):
        at = slice(start, start + size)
        out[at] = expert(x[tokens.index[at]]) * tokens.weight[at].to(x.dtype).unsqueeze(1)
    return out


def prune_expert(
    method: WeightMethod,
    expert: Expert,
    stored: Expert,
    x: Tensor,
    routing: Routing,
    place: tuple[int, int],
    pattern: Pattern,
    key: Key,
    *,
    rescale: bool = False,
    propagate: str = "pruned",
    chunk: int = 8192,
    name: str = "expert",
) -> Outcome:
    """Prune one expert with the calibration tokens of its layer.

    Args:
        method: the score. expert: its matrices in the compute dtype, masked in place at the end. stored: as in the checkpoint.
        x: input of the layer's experts, (T, d). routing: the router's decision for those tokens.
        place: (layer, expert). pattern: how much goes. key: for methods that draw.
        rescale: one factor per output row. propagate: whose output is returned, the pruned or the dense expert's.

    Raises:
        DataError: activations that are not finite, naming the expert.
    """
    layer, e = place
    chosen, routed = method.tokens(routing, e), Tokens(*routing.routed(e))
    same = torch.equal(chosen.index, routed.index)
    sums: dict[str, Tensor] = {}
    statistics = method.begin(expert)
    dense: Tensor | None = None
    if statistics is not None and same:  # the statistics pass already has h: one product more gives the dense output
        dense = x.new_empty(len(routed.index), x.shape[1])
        for i, part in enumerate(chunks(expert, x, chosen, chunk)):
            statistics.add(part)
            at = slice(i * chunk, i * chunk + len(part.x))
            dense[at] = (part.h @ expert.down.T) * routed.weight[at].to(x.dtype).unsqueeze(1)
    else:
        if statistics is not None:
            for part in chunks(expert, x, chosen, chunk):
                statistics.add(part)
        dense = gated_output(expert, x, routed, chunk)
    if statistics is not None:
        sums = statistics.state()
        _check_finite(sums, name)
    cut, fallback = decide(method, expert, sums, len(chosen.index), pattern, key)
    if rescale and len(chosen.index):
        scales = RowScales(expert, cut.applied(expert))
        for part in chunks(expert, x, chosen, chunk):
            scales.add(part)
        cut = scales.cut(cut)
    matrices = store(cut, stored)
    pruned = forward_form(cut, expert, matrices)
    output = gated_output(pruned, x, routed, chunk)
    whole = float(dense.double().norm())
    if not math.isfinite(whole):
        raise _not_finite(name)
    error = float((dense - output).double().norm()) / whole if whole > 0 else None
    row = Row(layer, e, len(routed.index), float(routed.weight.double().sum()), fallback, share_dropped(cut.masks), error)
    return Outcome(matrices, cut.masks, dense if propagate == "dense" else output, sums, row, len(chosen.index))


def decide(method: WeightMethod, expert: Expert, sums: Mapping[str, Tensor], tokens: int, pattern: Pattern, key: Key) -> tuple[Cut, bool]:
    """The cut, and whether too few tokens, or a sum that is zero everywhere (router weights too small to be squared), forced the
    fallback: scores of zero would drop the first columns."""
    if tokens < method.min_tokens or not all(bool(s.any()) for s in sums.values()):
        return magnitude_cut(expert, pattern), True
    return method.cut(expert, sums, pattern, key), False


def store(cut: Cut, stored: Expert) -> dict[str, Tensor]:
    """The pruned matrices as the checkpoint has them; kept weights that no repair touched are the stored ones, bit for bit."""
    return {r: keep(cut.weights[r].to(w) if r in cut.weights else w, cut.masks[r].to(w.device)) for r in ROLES for w in (stored.matrix(r),)}


def forward_form(cut: Cut, expert: Expert, matrices: Mapping[str, Tensor]) -> Expert:
    """The pruned expert as the forward pass computes with it: what was stored, in the compute dtype."""
    found = []
    for role in ROLES:
        weight, new = expert.matrix(role), matrices[role]
        if role in cut.weights or (new.dtype == weight.dtype and new.device == weight.device):
            found.append(new.to(weight))
        else:
            found.append(keep(weight, cut.masks[role], out=weight))
    return Expert(*found)


def share_dropped(masks: Mapping[str, Tensor]) -> float:
    return 1 - sum(kept(m) for m in masks.values()) / sum(m.numel() for m in masks.values())


def _check_finite(sums: Mapping[str, Tensor], name: str) -> None:
    if not all(bool(torch.isfinite(s).all()) for s in sums.values()):
        raise _not_finite(name)


def _not_finite(name: str) -> DataError:
    hint = "a damaged checkpoint, or activations beyond float32; try compute=float32"
    return DataError(Issue(name, "activations are not finite during calibration", hint=hint, has_value=False))
