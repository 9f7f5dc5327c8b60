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
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xutrain.engine.workers import Workers, joined
from xutrain.errors import Issue, RecipeError
from xutrain.methods.pretrain.dsm import sign_momentum


class DSM:
    """Distributed sign momentum over the parameters of ``optimizer`` that take gradients.

        D = (1/n) sum_i (x_t - x^i) / gamma;   c = beta1 m + (1 - beta1) D;   m <- beta2 m + (1 - beta2) D
        x_{t+1} = (1 - eta gamma lambda) x_t - eta gamma sign(c)

    gamma is the learning rate that the optimizer used in the round's last local step, of each parameter's own group; rank 0's
    where ranks differ. x_t and m are float32 for parameters of half precision, whose displacement starts at x_t as they can hold it.

    Args:
        optimizer: any torch optimizer; its state stays with its rank.
        local_steps: tau, steps between two global steps.
        eta, beta1, beta2, weight_decay: as above. 1 / (1 - beta2) should be 1 to 5 per cent of the rounds.

    Attributes:
        skipped: rounds that all ranks took back because a displacement was not finite.

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
        _check(optimizer, local_steps=local_steps, eta=eta, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        self.optimizer, self.local_steps = optimizer, local_steps
        self.eta, self.beta1, self.beta2, self.weight_decay = eta, beta1, beta2, weight_decay
        rank, processes = joined()
        self.workers = Workers(processes, rank, processes, "ring")
        self.taken = self.skipped = 0
        self._rates: list[float] = []
        self._x: dict[int, Tensor] = {}
        self._m: dict[int, Tensor] = {}
        with contextlib.suppress(AttributeError):  # a wrapper without hooks: its rates are read at the end of a round
            optimizer.register_step_post_hook(self._note_rates)
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            x = self.workers.broadcast(_master(parameter))  # frozen ones as well
            with torch.no_grad():
                parameter.copy_(x)
            if parameter.requires_grad:
                self._x[i], self._m[i] = x, torch.zeros_like(x)

    def _note_rates(self, *_: Any) -> None:
        """After every step of the optimizer: the rates it used, which a scheduler may change before ``step`` is called."""
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _held(self) -> Iterator[tuple[int, nn.Parameter, int]]:
        """(number, parameter, its group) of what the global model consists of, in the optimizer's order."""
        number = 0
        for at, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                if number in self._x:
                    yield number, parameter, at
                elif parameter.requires_grad:
                    hint = "make the DSM after the optimizer has all its parameters and none of them is frozen any more"
                    raise RecipeError(Issue("DSM", "the optimizer trains a parameter that it did not when the DSM was made", number, hint))
                number += 1

    @torch.no_grad()
    def step(self) -> bool:
        """Count one local step; at the end of a round take the global step. Returns whether the parameters are x_t now."""
        if joined() != (self.workers.rank, self.workers.processes):
            hint = "call torch.distributed.init_process_group before xutrain.DSM(...)"
            raise RecipeError(Issue("DSM", "the process group was joined after the DSM was made", joined(), hint))
        self.taken += 1
        if self.taken < self.local_steps:
            return False
        self.taken = 0
        moved = [(i, group, _start(self._x[i], p) - p) for i, p, group in self._held() if p.requires_grad]
        if self._broken(not all(bool(torch.isfinite(d).all()) for _, _, d in moved)):
            self.skipped += 1
            self._forget()
        else:
            for i, group, displacement in moved:
                self._advance(i, self.workers.mean([displacement]), self._rates[group])
        self._rates = []
        self._give_back()
        return True

    def _broken(self, here: bool) -> bool:
        """Whether any rank is broken; all take rank 0's rates."""
        if not self._rates:
            self._note_rates()
        if self.workers.processes > 1:
            device = next(iter(self._x.values())).device
            self._rates = self.workers.broadcast(torch.tensor(self._rates, dtype=torch.float64, device=device)).tolist()
            here = bool(self.workers.sum([torch.tensor([float(here)], device=device)]) > 0)
        return here

    def _advance(self, i: int, displacement: Tensor, gamma: float) -> None:
        """The global step of one parameter; none where its rate is 0."""
        if gamma > 0:
            c = sign_momentum(displacement.div_(gamma), self._m[i], self.beta1, self.beta2)
            self._x[i].mul_(1 - self.eta * gamma * self.weight_decay).add_(c.sign_(), alpha=-self.eta * gamma)

    def _forget(self) -> None:
        """Where a round broke, moments that are not finite start anew; else every later round would break as well."""
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    value.zero_()

    def _give_back(self) -> None:
        for i, parameter, _ in self._held():
            parameter.copy_(self._x[i])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the parameters are x_t, the global model, also in the middle of a round."""
        own = [(p, p.detach().clone()) for _, p, _ in self._held()]
        try:
            with torch.no_grad():
                self._give_back()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in own:
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """x_t, m and the place in the round; save it beside the states of model and optimizer of every rank."""
        return {"taken": self.taken, "skipped": self.skipped, "x": dict(self._x), "m": dict(self._m)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on bit by bit, model and optimizer restored as well.

        Raises:
            RecipeError: the state is of other parameters.
        """
        for name, own in (("x", self._x), ("m", self._m)):
            given = {int(i): tuple(t.shape) for i, t in state[name].items()}
            if given != {i: tuple(t.shape) for i, t in own.items()}:
                raise RecipeError(Issue("DSM.load_state_dict", f"{name} is of other parameters than the optimizer's", given))
        self.taken, self.skipped = int(state["taken"]), int(state["skipped"])
        self._x = {int(i): t.to(self._x[int(i)], copy=True) for i, t in state["x"].items()}
        self._m = {int(i): t.to(self._m[int(i)], copy=True) for i, t in state["m"].items()}


def _master(tensor: Tensor) -> Tensor:
    """A contiguous copy in float32, or in float64 where the tensor has that."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)


def _start(x: Tensor, parameter: Tensor) -> Tensor:
    """x_t as ``parameter`` held it when the round began: rounded to its precision."""
    return x.to(parameter.dtype).to(x.dtype)


def _check(optimizer: Any, **values: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RecipeError(Issue("DSM(optimizer)", "is no torch optimizer", type(optimizer).__name__, "give the optimizer, not the model"))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in held) or not all(p.is_floating_point() for p in held):
        hint = "parameters of real numbers, at least one of them with requires_grad"
        raise RecipeError(Issue("DSM(optimizer)", "holds nothing to train, or what has no sign", has_value=False, hint=hint))
    right = {
        "local_steps": lambda v: isinstance(v, int) and v >= 1,
        "eta": lambda v: 0 < v < math.inf,
        "beta1": lambda v: 0 <= v < 1,
        "beta2": lambda v: 0 <= v < 1,
        "weight_decay": lambda v: 0 <= v < math.inf,
    }
    found = [n for n, v in values.items() if isinstance(v, bool) or not isinstance(v, (int, float)) or not right[n](v)]
    if found:
        raise RecipeError(*(Issue(f"DSM({name}=...)", "is out of range", values[name]) for name in found))
