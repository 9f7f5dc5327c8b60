"""CSER: communication-efficient SGD with error reset (arXiv 2007.13221), as the DEF authors' code computes it.

    g = gradient at x^k + wd x^k;   m^k <- mu m^k + g
    every step: c = mean_k C1(lr m^k), r^k the rest;   x <- x - c;   a^k <- a^k - r^k
    every ``reset_every`` steps: c' = mean_k C2(a^k), r'^k the rest;   x <- x + c';   a^k <- r'^k

x^k is worker k's model, a^k its deviation; the workers agree on x = x^k - a^k. C2 is the recipe's codec; C1 is ``step_codec``, null:
nothing is sent (R1 = 0 of the authors' script).

Limits: step_codec null with reset_every 1 is SAEF without averaging (a = -e) for a codec with C(-v) = -C(v), and with C2 the identity
and reset_every H local SGD with H steps; step_codec fp is SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain import registry
from xutrain.errors import Issue
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.codecs.base import Codec
from xutrain.methods.exchange import Exchange
from xutrain.methods.sparsify.soundness import no_feedback_over_shards, not_contractive
from xutrain.recipe.schema import Choice
from xutrain.registry import Named, method


@method("sparsify", "cser", paper="2007.13221", summary="baseline: SGD whose workers drift apart and are partly reset")
class CSER(DataParallel):
    """``velocity`` and ``deviation`` per worker; measured first at the mean of the workers' models."""

    class Options(Named):
        name: str = "cser"
        reset_every: int = Field(1, ge=1, le=10**6, description="Steps between resets.")
        step_codec: Annotated[Named | None, Choice("codec")] = Field(None, description="Codec of every step's updates; null sends nothing.")
        eval_point: Literal["y", "x"] = Field("y", description="y: the mean of the workers' models; x: what they agree on.")

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        hosted = setup.workers.hosted
        self.velocity = [torch.zeros_like(self.x) for _ in hosted]
        self.deviation = [torch.zeros_like(self.x) for _ in hosted]
        self.work = [self.x.clone() for _ in hosted]
        self.first: Exchange | None = None
        if options.step_codec is not None:
            codec = registry.load("codec", options.step_codec.name)(options.step_codec, workers=setup.workers.count)
            codec.lay(setup.layout)
            self.first = Exchange(setup.workers, codec, setup.exchange.meter, setup.exchange.mode)

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        found, step = no_feedback_over_shards(recipe, codec), recipe.method.step_codec
        if step is not None and registry.load("codec", step.name)(step, workers=recipe.workers).expands:
            what = "leaves a residual larger than the vector itself, by which the workers drift apart"
            found.append(Issue("method.step_codec", what, step.name, "set method.step_codec=null, or method.step_codec=scaled_sign"))
        return found

    def notes(self) -> list[str]:
        return not_contractive(self.setup.exchange.codec)

    def point(self, worker: int) -> Tensor:
        return self.work[worker - self.setup.workers.hosted.start]

    def exchanges(self, step: int) -> bool:
        return self.first is not None or self._resets(step)

    def _resets(self, step: int) -> bool:
        return bool((step + 1) % self.options.reset_every == 0)

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        o, ctx = self.setup.optimizer, self.setup.ctx
        for slot, grad in enumerate(grads):
            if o.weight_decay:
                grad.add_(self.work[slot], alpha=o.weight_decay)
            self.velocity[slot].mul_(o.momentum).add_(grad)
            grads[slot] = (grad.add_(self.velocity[slot], alpha=o.momentum) if o.nesterov else self.velocity[slot]) * lr
        if self.first is not None:
            self.x.sub_(self.first.feedback(grads, ctx.key("step", step), "step").mean)
        for rest, deviation in zip(grads, self.deviation, strict=True):
            deviation.sub_(rest)
        if self._resets(step):
            self.x.add_(self.setup.exchange.feedback(self.deviation, ctx.key("round", step // self.options.reset_every)).mean)
        for slot, deviation in enumerate(self.deviation):
            torch.add(self.x, deviation, out=self.work[slot])

    def deploy(self) -> dict[str, Tensor]:
        points = {"x": self.x, "y": self.x + self.setup.workers.mean(self.deviation)}
        first = self.options.eval_point
        return {first: points.pop(first), **points}

    def planned_bits(self, steps: int) -> dict[str, tuple[int, int]]:
        up, down = self.setup.exchange.bits(self.x.numel())
        count = steps // self.options.reset_every
        parts = {"gradient": (count * up, count * down)}
        if self.first is not None:
            up, down = self.first.bits(self.x.numel())
            parts["step"] = (steps * up, steps * down)
        return parts

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        shared = {"x": self.x, "first": self.first.codec.state() if self.first else {}}
        rows = zip(self.setup.workers.hosted, self.velocity, self.deviation, strict=True)
        return shared, {w: {"velocity": v, "deviation": a} for w, v, a in rows}

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        if self.first:
            self.first.codec.load_state(shared["first"])
        states = [worker(w) for w in self.setup.workers.hosted]
        self.velocity, self.deviation = ([s[name] for s in states] for name in ("velocity", "deviation"))
        self.work = [self.x + a for a in self.deviation]
