"""Path: the damage of one weight followed through the SwiGLU (ours; extends arXiv:2410.12013).

    S(W3)_mj = |W3_mj| sqrt( sum_t g_t^2 silu(a_tm)^2 x_tj^2 )
    S(W1)_mj = |W1_mj| sqrt( sum_t g_t^2 (silu'(a_tm) b_tm)^2 x_tj^2 )
    S(W2)_ij = |W2_ij| sqrt( sum_t g_t^2 h_tj^2 ),    a = W1 x, b = W3 x, h = silu(a) * b

Zeroing W3_mj changes the gated output of the layer by ||W2[:, m]|| S(W3)_mj, exactly; W1_mj by ||W2[:, m]|| S(W1)_mj, to first
order; W2_ij by MoE-Pruner's own score, exactly. ||W2[:, m]|| is constant in a row, so it drops out of the comparison.

Limits: W2's mask is MoE-Pruner's; scaling g by a constant per expert changes no mask.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from xutrain.methods.prune.base import Expert, Routing, Tokens, WeightMethod
from xutrain.methods.prune.moe_pruner import GATE_FIELD, Gate, gated_tokens
from xutrain.methods.prune.moments import PathMoments
from xutrain.registry import method


@method("prune", "path", summary="exact single-weight damage through the SwiGLU (ours)")
class Path(WeightMethod):
    class Options(WeightMethod.Options):
        gate: Gate = GATE_FIELD

    statistics = PathMoments
    cacheable = False  # the sums of W1 and W3 are as large as the matrices

    def tokens(self, routing: Routing, expert: int) -> Tokens:
        return gated_tokens(routing, expert, self.options.gate)  # type: ignore[attr-defined]

    def scores(self, expert: Expert, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "gate": expert.gate.abs() * sums["gate"].sqrt(),
            "up": expert.up.abs() * sums["up"].sqrt(),
            "down": expert.down.abs() * sums["h"].sqrt(),
        }
