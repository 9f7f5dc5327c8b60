"""SparseGPT (arXiv:2301.00774): prune block by block of columns and let the remaining weights make up for it.

    H = sum_t g_t^2 z_t z_t^T,    U^T U = (H + damping mean(diag H) I)^-1,    U upper triangular
    S_ij = W_ij^2 / U_jj^2
    for each column j in turn:  e_i = W_ij / U_jj where W_ij goes, else 0;    W_il <- W_il - e_i U_jl  for l > j

z is the input of the matrix. The mask of a block of 128 columns uses one threshold for all rows, inclusive (or n:m per row). ``gate``
weights the tokens in H by the router (g^2), ours; by default g = 1. ``invariant`` divides the columns by sqrt(diag H) first, damps in
that scale and compares inside rows (ours): the result then does not depend on how channels are scaled.

Limits: diagonal H changes no kept weight; H proportional to I is magnitude in a block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import Failed
from xutrain.methods.prune.base import Cut, Expert, Routing, Tokens, WeightMethod
from xutrain.methods.prune.masks import Pattern, matrix_mask, row_mask
from xutrain.methods.prune.moe_pruner import Gate, gated_tokens
from xutrain.methods.prune.moments import Hessians
from xutrain.registry import method


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, *, block: int = 128, damping: float = 0.01, invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Prune one matrix.

    Args:
        weight: (rows, d_in). hessian: (d_in, d_in), symmetric, any scale.
        pattern: unstructured sparsity or n:m.
        block: columns whose mask is chosen together; n:m groups must not straddle blocks.
        damping: fraction of the mean diagonal of H added to it.
        invariant: work in units of sqrt(diag H) and take unstructured masks per row.

    Returns:
        The new weight and its mask (True = kept), both (rows, d_in).
    """
    W, H = weight.to(hessian.dtype, copy=True), hessian.clone()
    columns = W.shape[1]
    if pattern.of is not None:
        block = max(1, block // pattern.of) * pattern.of
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    scale = H.diagonal().sqrt() if invariant else torch.ones_like(H.diagonal())
    W *= scale
    H /= scale.unsqueeze(0) * scale.unsqueeze(1)
    H.diagonal().add_(damping * H.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(H)
    if int(failed) == 0:
        U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        raise Failed.at(
            "method.damping", "the Hessian is not positive definite", value=damping, hint="use more calibration tokens or damping=0.1"
        )
    mask = torch.ones_like(W, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        w, u, m = W[:, start:stop], U[start:stop, start:stop], mask[:, start:stop]
        errors = torch.zeros_like(w)
        if pattern.of is None:
            score = w.square() / u.diagonal().square()
            m.copy_((row_mask if invariant else matrix_mask)(score, pattern))
        for i in range(stop - start):
            if pattern.of is not None and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                m[:, group] = row_mask(w[:, group].square() / u.diagonal()[group].square(), pattern)
            column = w[:, i]
            error = torch.where(m[:, i], 0.0, column / u[i, i])
            w[:, i] = torch.where(m[:, i], column, 0.0)
            w[:, i + 1 :] -= error.unsqueeze(1) * u[i, i + 1 :]
            errors[:, i] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    mask[:, dead] = False
    return W / scale, mask


@method("prune", "sparsegpt", paper="2301.00774", summary="second-order pruning with weight update; gated and scale-invariant forms")
class SparseGPT(WeightMethod):
    class Options(WeightMethod.Options):
        gate: Gate = Field("none", description="router weight of a token in the Hessian; none is the published method")
        invariant: bool = Field(False, description="scale-invariant damping and per-row masks (ours)")
        block: int = Field(128, ge=1, description="columns whose mask is chosen together")
        damping: float = Field(0.01, gt=0, le=10, description="fraction of the mean diagonal of H that is added to it")

    statistics = Hessians
    cacheable = False

    def tokens(self, routing: Routing, expert: int) -> Tokens:
        return gated_tokens(routing, expert, self.options.gate)  # type: ignore[attr-defined]

    def cut(self, expert: Expert, sums: Mapping[str, Tensor], pattern: Pattern, key: Key) -> Cut:
        o = self.options
        done = {}
        for role in ("gate", "up", "down"):
            hessian = sums["h" if role == "down" else "x"]
            how = {"block": o.block, "damping": o.damping, "invariant": o.invariant}  # type: ignore[attr-defined]
            done[role] = sparsegpt(expert.matrix(role), hessian, pattern, **how)
        return Cut({r: m for r, (_, m) in done.items()}, {r: w for r, (w, _) in done.items()})
