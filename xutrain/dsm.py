"""DSM around a user's own optimizer and model, in a plain PyTorch loop.

    dsm = xutrain.DSM(optimizer, local_steps=12)      # after the optimizer; all ranks take rank 0's weights
    ...
    optimizer.step()
    dsm.step()                                        # every 12th call is the global step of arXiv 2411.17866

Without torch.distributed it is signed Lookahead with momentum (one worker). Do not wrap the model in DistributedDataParallel,
which would average gradients every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.workers import Workers, joined
from xutrain.errors import Issue, RecipeError
from xutrain.methods.pretrain.dsm import sign_momentum


class DSM:
    """Distributed sign momentum over the parameters of ``optimizer``.

        D = (1/n) sum_i (x_t - x^i) / gamma;   c = beta1 m + (1 - beta1) D;   m <- beta2 m + (1 - beta2) D
        x_{t+1} = (1 - eta gamma lambda) x_t - eta gamma sign(c)

    gamma is the optimizer's learning rate at the round's last local step (of each parameter's own group).

    Args:
        optimizer: any torch optimizer; its state stays with its rank.
        local_steps: tau, steps between two global steps.
        eta, beta1, beta2, weight_decay: as above. 1 / (1 - beta2) should be 1 to 5 per cent of the rounds.

    Raises:
        RecipeError: a value that cannot be right.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        local_steps: int = 12,
        eta: float = 1.0,
        beta1: float = 0.95,
        beta2: float = 0.98,
        weight_decay: float = 0.1,
    ) -> None:
        for name, value, right in (
            ("local_steps", local_steps, local_steps >= 1),
            ("eta", eta, eta > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not right:
                raise RecipeError(Issue(f"DSM({name}=...)", "is out of range", value))
        self.optimizer, self.local_steps = optimizer, local_steps
        self.eta, self.beta1, self.beta2, self.weight_decay = eta, beta1, beta2, weight_decay
        rank, processes = joined()
        self.workers = Workers(processes, rank, processes, "ring")
        self.count = 0
        self._x: dict[int, Tensor] = {}
        self._m: dict[int, Tensor] = {}
        for i, parameter, _ in self._parameters():
            self.workers.broadcast(parameter.data)
            self._x[i] = parameter.detach().float().clone()
            self._m[i] = torch.zeros_like(self._x[i])

    def _parameters(self) -> Iterator[tuple[int, torch.nn.Parameter, float]]:
        """(number, parameter, learning rate), in the optimizer's order."""
        number = 0
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield number, parameter, float(group["lr"])
                number += 1

    @torch.no_grad()
    def step(self) -> bool:
        """Count one local step; at the end of a round take the global step. Returns whether the parameters are x_t now."""
        self.count += 1
        if self.count % self.local_steps:
            return False
        moved = [(i, p, gamma, self._x[i] - p.detach().float()) for i, p, gamma in self._parameters()]
        broken = torch.stack([~torch.isfinite(d).all() for _, _, _, d in moved]).any().float()
        if float(self.workers.sum([broken])) == 0:  # else all go back to x_t
            for i, _, gamma, displacement in moved:
                mean = self.workers.mean([displacement])
                if gamma > 0:
                    c = sign_momentum(mean.div_(gamma), self._m[i], self.beta1, self.beta2)
                    self._x[i].mul_(1 - self.eta * gamma * self.weight_decay).add_(c.sign_(), alpha=-self.eta * gamma)
        for i, parameter, _ in self._parameters():
            parameter.copy_(self._x[i])
        return True

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the parameters are x_t, the global model, also in the middle of a round."""
        own = {i: p.detach().clone() for i, p, _ in self._parameters()}
        try:
            with torch.no_grad():
                for i, parameter, _ in self._parameters():
                    parameter.copy_(self._x[i])
            yield
        finally:
            with torch.no_grad():
                for i, parameter, _ in self._parameters():
                    parameter.copy_(own[i])

    def state_dict(self) -> dict[str, Any]:
        """x_t, m and the place in the round; save it beside the states of model and optimizer of every rank."""
        return {"count": self.count, "x": dict(self._x), "m": dict(self._m)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on bit by bit, model and optimizer restored as well."""
        self.count = int(state["count"])
        self._x = {int(i): t.clone() for i, t in state["x"].items()}
        self._m = {int(i): t.clone() for i, t in state["m"].items()}
