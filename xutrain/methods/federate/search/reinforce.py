"""REINFORCE with a windowed baseline: rewards, advantages and the ascent step.

Reward of round q's sample (both public programs): r_q = 1 - L_{q+1} / L_q; ``log`` is ln(L_q / L_{q+1}), which telescopes.
With the n = min(q, Z) newest rewards and their mean r~, the update after round q's loss is

    g = sum over the window of (r_t - r~) grad log P(u_t; psi),    psi <- Adam-ascent(psi, g; lr, 0.7, 0.7)         (1)

Self-including mean: for u ~ N(mu, sigma^2 I) and r = a.u the expectation of g_mu is (n - 1) a, n a without a baseline;
``leave_one_out`` multiplies by n / (n - 1). Nothing moves before there are two rewards. ``released_bug`` keeps the oldest
term of the sum only: the public loop assigns where it should add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xutrain.methods.federate.base import State


def reward(before: float, after: float, form: str = "relative", clip: float | None = 1.0) -> float:
    """r of a round from the losses before and after it; 0 where the loss was 0, -1 where the new one is not finite."""
    if not math.isfinite(after):
        return -1.0
    if before == 0:
        return 0.0
    if form == "log":
        value = math.log(before / after) if before > 0 and after > 0 else (math.inf if before > 0 else 0.0)
    else:
        value = 1.0 - after / before
    if clip is not None:
        return min(max(value, -clip), clip)
    return value if math.isfinite(value) else 0.0


def advantages(rewards: Sequence[float], baseline: str = "mean", *, newest: bool = False, oldest: bool = False) -> Tensor:
    """r_t minus the baseline for every remembered reward, oldest first, shape (n,).

    Args:
        baseline: mean, none or leave_one_out.
        newest: zero all but the newest term (``window_update: false``).
        oldest: zero all but the oldest (``released_bug``).
    """
    r = torch.tensor(list(rewards), dtype=torch.float64)
    n = len(r)
    if n and baseline == "mean":
        r = r - r.mean()
    elif baseline == "leave_one_out":
        r = (r - r.mean()) * (n / (n - 1)) if n > 1 else torch.zeros_like(r)
    if newest:
        r[:-1] = 0
    if oldest:
        r[1:] = 0
    return r


def adam_ascent(params: State, gradient: dict[str, Tensor], state: State, lr: float, beta1: float, beta2: float) -> None:
    """Adam (Kingma & Ba 2015, bias-corrected, eps 1e-8) upward, in place. With equal betas nearly a sign method: a constant
    gradient moves a coordinate by lr a step, and the scale of the rewards cancels."""
    state["step"] = step = int(state.get("step", 0)) + 1
    for name, g in gradient.items():
        m = state.setdefault(f"{name}.first", torch.zeros_like(g)).mul_(beta1).add_(g, alpha=1 - beta1)
        v = state.setdefault(f"{name}.second", torch.zeros_like(g)).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        params[name].add_(lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8))
