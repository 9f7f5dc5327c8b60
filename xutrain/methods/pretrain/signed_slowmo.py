"""Signed SlowMo in two forms, baselines of arXiv 2411.17866.

    A (signed_slowmo_a)   m <- beta m + (1 - beta) D;          x <- (1 - eta gamma lambda) x - eta gamma sign(m)
    B (signed_slowmo_b)   m <- beta m + (1 - beta) sign(D);    x <- (1 - eta gamma lambda) x - eta gamma m

D = (1/n) sum_i (x - x^i) / gamma. A is DSM with one beta and the momentum updated before use. B is the flag ``sign_momentum`` of
the authors' program; its step is no sign, so parameters travel back. As in that program, its eta may fall from ``eta`` to
``eta_end`` in a straight line within the first ``eta_steps`` steps.

Limits: beta = 0 is signed Lookahead, in both forms.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.base_optimizers import shrink
from xutrain.methods.pretrain.base import LocalSteps, Piece, RoundOptions
from xutrain.methods.pretrain.signs import SignOptions, SignSteps
from xutrain.registry import method


@method(
    "pretrain",
    "signed_slowmo_a",
    paper="2411.17866",
    summary="baseline: the sign of a momentum of displacements",
    aliases=("signed_slowmo",),
)
class SignedSlowMoA(SignSteps):
    class Options(SignOptions):
        beta: float = Field(0.8, ge=0, lt=1, description="momentum over rounds")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(x)}

    def direction(self, delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        beta = self.options.beta
        return memory["m"].mul_(beta).add_(delta, alpha=1 - beta)


@method("pretrain", "signed_slowmo_b", paper="2411.17866", summary="baseline: a momentum of signs of displacements")
class SignedSlowMoB(LocalSteps):
    class Options(RoundOptions):
        beta: float = Field(0.8, ge=0, lt=1, description="momentum over rounds")
        eta: float = Field(1.0, gt=0, le=1e6, description="global rate")
        eta_end: float | None = Field(None, ge=0, le=1e6, description="global rate from step eta_steps on; null: eta all the time")
        eta_steps: int = Field(2000, ge=1, le=10**12, description="steps in which eta becomes eta_end")
        weight_decay: float = Field(0.1, ge=0, le=1e3, description="lambda: decay of the global step, on all parameters")

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(x)}

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        o = self.options
        eta = self.rate((piece.round + 1) * o.local_steps - 1)
        memory["m"].mul_(o.beta).add_(delta.sign_(), alpha=1 - o.beta)
        shrink(x, [(0, x.numel())], 1 - eta * gamma * o.weight_decay)
        x.add_(memory["m"], alpha=-eta * gamma)

    def rate(self, step: int) -> float:
        """eta at the round that ends with ``step`` (from 0)."""
        o = self.options
        done = min(1.0, step / o.eta_steps)
        return float(o.eta if o.eta_end is None else o.eta + done * (o.eta_end - o.eta))
