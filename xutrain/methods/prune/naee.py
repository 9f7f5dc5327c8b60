"""NAEE (arXiv:2402.14800): try every subset of experts and keep the one whose layer output is nearest to the dense one.

    loss(R) = sum_b ||Z_b - Z_b(R)||_F,    Z(R)_t = sum_{e in top-k of R} g_te(R) E_e(x_t)
    R = argmin of loss over the subsets of r experts

For each subset R of r experts (``keep``) the router sees only those (the others' logits are minus infinity, softmax and top-k
redone); Z is the dense layer's output, b a calibration batch, the norm in float64. Exhaustive: 28 subsets for 8 -> 6, 70 for
8 -> 4. All experts of one layer are in memory at once.

Limits: r = n drops nothing, with loss 0.
"""

from __future__ import annotations

import itertools
import math

import torch
from pydantic import Field
from torch import Tensor

from xutrain.errors import DataError, Issue, RecipeError
from xutrain.methods.prune.base import Routing
from xutrain.methods.prune.drop import ExpertMethod, LayerView
from xutrain.models.decoder import route
from xutrain.registry import method

#: More subsets than this are not tried.
MOST = 20_000


@method("prune", "naee", paper="2402.14800", summary="drop the subset of experts that changes the layer's output least")
class NAEE(ExpertMethod):
    class Options(ExpertMethod.Options):
        batch_tokens: int = Field(4096, ge=1, description="tokens whose Frobenius norm is taken together")

    def choose(self, view: LayerView) -> list[int]:
        losses = self.losses(view)
        best = min(losses.items(), key=lambda item: (item[1], item[0]))
        return list(best[0])

    def losses(self, view: LayerView) -> dict[tuple[int, ...], float]:
        """The loss of keeping each subset. Raises RecipeError for more subsets than can be tried."""
        n = view.forward.arch.experts
        if (count := math.comb(n, self.keep)) > MOST:
            hint = "use reap, ean or frequency for models with many experts"
            raise RecipeError(
                Issue("method.keep", f"{count} subsets of {self.keep} out of {n} experts cannot all be tried", self.keep, hint)
            )
        subsets = list(itertools.combinations(range(n), self.keep))
        experts = [view.forward.read(view.index, e) for e in range(n)]
        totals = dict.fromkeys(subsets, 0.0)
        for x in view.x.split(self.options.batch_tokens):  # type: ignore[attr-defined]
            outputs = torch.stack([e(x) for e in experts], 1)  # (t, n, d)
            logits = view.layer.block.logits(x)
            whole = combine(outputs, Routing(*route(view.forward.arch, logits)))
            for subset in subsets:
                others = [e for e in range(n) if e not in subset]
                masked = logits.index_fill(1, torch.tensor(others, dtype=torch.int64, device=logits.device), -torch.inf)
                kept = combine(outputs, Routing(*route(view.forward.arch, masked)))
                totals[subset] += float((whole - kept).double().norm())
            if not math.isfinite(sum(totals.values())):
                raise DataError(Issue(f"layer {view.index}", "outputs of experts are not finite during calibration", has_value=False))
        return totals


def combine(outputs: Tensor, routing: Routing) -> Tensor:
    """The layer's output (t, d) from all experts' outputs (t, n, d)."""
    chosen = outputs.gather(1, routing.index.unsqueeze(2).expand(-1, -1, outputs.shape[2]))
    return (chosen * routing.weight.to(outputs.dtype).unsqueeze(2)).sum(1)
