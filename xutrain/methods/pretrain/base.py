"""Local steps with a global step at the end of every round: what DSM and its baselines share (arXiv 2411.17866).

    x_t        model that all workers start round t from (x_{t,0})
    x^i        model of worker i, tau steps of its own base optimizer later
    D          (1/n) sum_i (x_t - x^i) / gamma    the pseudo-gradient, in units of a gradient
    gamma      learning rate of the round's last local step (option ``gamma``)

Differences are taken before they are averaged, in float32: x^i differs from x_t in its last digits only when gamma is small.
A baseline is one formula: how x_t becomes x_{t+1}, given D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.base_optimizers import base_optimizer
from xutrain.errors import Issue, RecipeError
from xutrain.methods.base import Setup
from xutrain.methods.owners import Owners
from xutrain.methods.pretrain.feedback import FeedbackOptions, WithFeedback


class RoundOptions(FeedbackOptions):
    """What every method with local steps understands."""

    local_steps: int = Field(12, ge=1, le=10**9, description="tau: steps that each worker takes alone between two global steps")
    gamma: Literal["last", "first", "mean"] = Field("last", description="which of the round's learning rates the global step uses")
    shards: int | None = Field(
        None, ge=1, description="cut the global state into so many parts, each stepped by one worker; null: kept everywhere"
    )
    last_round: Literal["average", "refuse"] = Field(
        "average", description="steps left over by the last full round: average the workers, or refuse"
    )


@dataclass(frozen=True)
class Piece:
    """A contiguous part of the flat vector in round ``round``: elements ``start`` to ``stop``."""

    start: int
    stop: int
    round: int


class LocalSteps(WithFeedback):
    """Base of the methods with local steps. A method says how x_t and D become x_{t+1} (``advance``)."""

    #: messages are divided by gamma (D above); else they are plain displacements x_t - x^i
    divided = True

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.points = [self.x.clone() for _ in setup.workers.hosted]
        self.bases = [base_optimizer(setup.optimizer, setup.layout, self.x) for _ in setup.workers.hosted]  # type: ignore[arg-type]
        self.rates: list[float] = []
        self.skipped = 0
        self.ratio = float("nan")
        if setup.total_steps % options.local_steps and options.last_round == "refuse":  # a recipe in epochs could not know
            what, hint = f"does not divide the run's {setup.total_steps} steps", "give train.steps, or method.last_round=average"
            raise RecipeError(Issue("method.local_steps", what, options.local_steps, hint))
        self.owners = Owners(setup.exchange, self.x.numel(), options.shards) if options.shards else None
        held = self.owners.hosted if self.owners else [(0, self.x.numel())]
        self.memory = [self.fresh(self.x[start:stop]) for start, stop in held]

    def exchanges(self, step: int) -> bool:
        return (step + 1) % self.options.local_steps == 0 or step + 1 == self.setup.total_steps

    def fresh(self, x: Tensor) -> dict[str, Tensor]:
        """Global state of a part of the vector before the first round."""
        return {}

    def advance(self, x: Tensor, delta: Tensor, memory: dict[str, Tensor], gamma: float, piece: Piece) -> None:
        """Change ``x`` (a part of x_t) into that part of x_{t+1}, in place; ``delta`` is D there and is consumed."""
        raise NotImplementedError

    def round_down_bits(self) -> int:
        """Bits that all workers receive at a round's end where the global state has owners."""
        assert self.owners is not None
        return self.owners.float_bits

    def point(self, worker: int) -> Tensor:
        return self.points[worker - self.setup.workers.hosted.start]

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        for theta, base, grad in zip(self.points, self.bases, grads, strict=True):
            base.step(theta, grad, lr)
        self.rates.append(lr)
        if (step + 1) % self.options.local_steps == 0:
            self._end_round(step)
        elif step + 1 == self.setup.total_steps:
            self._average(step)

    def _end_round(self, step: int) -> None:
        gamma = {"last": self.rates[-1], "first": self.rates[0], "mean": sum(self.rates) / len(self.rates)}[self.options.gamma]
        self.rates = []
        messages = [self.x - theta for theta in self.points]
        if self.divided and gamma > 0:
            messages = [message.div_(gamma) for message in messages]
        if self._refuse_round(messages, possible=gamma > 0 or not self.divided):
            return
        number = (step + 1) // self.options.local_steps - 1
        before = self.x.clone()
        travelled = self._global_step(messages, gamma, number)
        moved = float(torch.linalg.vector_norm(self.x - before))
        self.ratio = moved / travelled if travelled else float("nan")
        for theta in self.points:
            theta.copy_(self.x)

    def _global_step(self, messages: list[Tensor], gamma: float, number: int) -> float:
        """x_t becomes x_{t+1}; returns the norm of the averaged displacement."""
        key, unit = self.setup.ctx.key("round", number), gamma if self.divided else 1.0
        self.add_left_out(messages)
        if self.owners is None:
            result = self.setup.exchange.mean(messages, key, "displacement", want_sent=bool(self.error))
            self.keep_left_out(messages, result.sent)
            travelled = float(torch.linalg.vector_norm(result.mean)) * unit
            self.advance(self.x, result.mean, self.memory[0], gamma, Piece(0, self.x.numel(), number))
            return travelled
        means, sent = self.owners.collect(messages, key, "displacement", want_sent=bool(self.error))
        self.keep_left_out(messages, sent)
        norms = self.setup.workers.objects([float(torch.linalg.vector_norm(mean)) for mean in means])
        self.x = self.step_pieces(means, gamma, number)
        return math.hypot(*norms) * unit

    def step_pieces(self, means: list[Tensor], gamma: float, number: int) -> Tensor:
        """x_{t+1} where the global state has owners: they advance their parts, and everyone gets them back."""
        assert self.owners is not None
        pieces = []
        for (start, stop), mean, memory in zip(self.owners.hosted, means, self.memory, strict=True):
            part = self.x[start:stop].clone()
            self.advance(part, mean, memory, gamma, Piece(start, stop, number))
            pieces.append(part)
        return self.owners.share(pieces, "model")

    def _refuse_round(self, messages: list[Tensor], *, possible: bool = True) -> bool:
        """Go back to x_t for all where a worker's message is not finite, or where there can be no step: gamma is 0 and divides it."""
        bad = [not bool(torch.isfinite(message).all()) for message in messages]
        if not self.setup.workers.any(any(bad)) and possible:
            return False
        for slot, theta in enumerate(self.points):
            theta.copy_(self.x)
            if bad[slot]:  # its moments hold what broke it
                self.bases[slot] = base_optimizer(self.setup.optimizer, self.setup.layout, self.x)  # type: ignore[arg-type]
        self.skipped += 1
        return True

    def _average(self, step: int) -> None:
        """Steps left over by the last full round end in a plain average of the workers, without a global step."""
        key = self.setup.ctx.key("last average", step)
        messages = [self.x - theta for theta in self.points]
        if self._refuse_round(messages):
            return
        result = self.setup.exchange.mean(messages, key, "last average")
        self.x.sub_(result.mean)
        for theta in self.points:
            theta.copy_(self.x)

    def planned_bits(self, steps: int) -> dict[str, tuple[int, int]]:
        rounds, left = divmod(steps, self.options.local_steps)
        up, down = self.setup.exchange.bits(self.x.numel())
        if self.owners is None:
            parts = {"displacement": (rounds * up, rounds * down)}
        else:
            parts = {"displacement": (rounds * self.owners.up_bits, 0), "model": (0, rounds * self.round_down_bits())}
        return {**parts, "last average": (up, down)} if left else parts

    def notes(self) -> list[str]:
        (rounds, left), tau = divmod(self.setup.total_steps, self.options.local_steps), self.options.local_steps
        end = "these end in a plain average of the workers, without a global step"
        found = [f"{self.setup.total_steps} steps are {rounds} rounds of {tau} and {left} more: {end}"] if left else []
        return [*found, *super().notes()]

    def diagnostics(self) -> dict[str, float]:
        found = {"rounds_skipped": float(self.skipped)} if self.skipped else {}
        return {**found, "step_ratio": self.ratio} if self.ratio == self.ratio else found

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        shared: dict[str, Any] = {"x": self.x, "rates": self.rates, "skipped": self.skipped, "ratio": self.ratio}
        if self.owners is None:
            shared["memory"] = self.memory[0]
        workers = {}
        for slot, worker in enumerate(self.setup.workers.hosted):
            mine: dict[str, Any] = {"point": self.points[slot], "base": self.bases[slot].state()}
            if self.error:
                mine["error"] = self.error[slot]
            if self.owners is not None:
                mine["memory"] = self.memory[slot]
            workers[worker] = mine
        return shared, workers

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.rates, self.skipped, self.ratio = list(shared["rates"]), shared["skipped"], shared["ratio"]
        mine = [worker(w) for w in self.setup.workers.hosted]
        self.points = [saved["point"] for saved in mine]
        for base, saved in zip(self.bases, mine, strict=True):
            base.load_state(saved["base"])
        if self.error:
            self.error = [saved["error"] for saved in mine]
        self.memory = [shared["memory"]] if self.owners is None else [saved["memory"] for saved in mine]
