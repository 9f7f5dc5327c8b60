"""Error feedback in parameter units, the part that EF, SAEF and DEF share (arXiv 2008.05823 and 2004.05298).

    x      model that all workers know               e^k  what worker k has produced and not sent, learning rate included
    m^k    worker k's own momentum                   p^k  where worker k takes its gradient
    s      what the server has left out (two-way)    y    x - mean_k e^k - s, the virtual point

    g = gradient at p^k + wd p^k;   m^k <- mu m^k + g;   e^k <- e^k + lr m^k        (p^k <- p^k - lr m^k between exchanges)
    at an exchange: c = mean_k C(e^k);   e^k <- e^k - C(e^k);   x <- x - c;   p^k <- x - lambda e^k

So y moves by -lr mean_k m^k whatever is sent. lambda 0 is EF, 1 is SAEF, between them DEF. ``local_optimizer: adagrad`` puts
g / sqrt(sum g^2) in the place of m^k; m^k then stands for the sum of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.errors import Issue
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.codecs.base import Codec
from xutrain.methods.sparsify.soundness import no_feedback_over_shards, not_contractive
from xutrain.registry import Named

_EPS = 1e-10  # of Adagrad, as in torch.optim


class FeedbackOptions(Named):
    """Options of every error feedback."""

    period: int = Field(1, ge=1, le=10**6, description="Local steps between exchanges.")
    two_way: bool = Field(False, description="The server compresses its answer with the same codec.")
    server_residual: bool = Field(True, description="two_way: the server keeps what its answer leaves out and adds it to the next one.")
    average_every: int = Field(0, ge=0, description="Every so many exchanges each worker's residual becomes the workers' mean; 0: never.")
    average_momentum: bool = Field(False, description="Average the momenta together with the residuals.")
    reset_every: int = Field(0, ge=0, description="Every so many exchanges the residuals are dropped (an ablation); 0: never.")
    local_optimizer: Literal["sgd", "adagrad"] = Field("sgd", description="A worker's own update: heavy ball, or g / sqrt(sum of g^2).")
    recalibrate_bn: int = Field(0, ge=0, le=10**6, description="Batches that give batch norm new statistics before measuring; 0: none.")
    init: Literal["model", "zero"] = Field(
        "model",
        description="zero: the common model starts at 0, so that the first message holds the weights (an artefact of the SAEF code)",
    )
    eval_point: Literal["x", "y", "local"] = Field(
        "x", description="Point that is saved and measured first: x, the virtual y, or worker 0's p."
    )


class Feedback(DataParallel):
    """Base of EF, SAEF and DEF; ``coeff`` is lambda."""

    class Options(FeedbackOptions):
        pass

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        given = getattr(options, "coeff", 0.0)
        self.coeff = 1.0 if given == "adaptive" else float(given)
        hosted = setup.workers.hosted
        self.error = [torch.zeros_like(self.x) for _ in hosted]
        self.velocity = [torch.zeros_like(self.x) for _ in hosted]
        if options.init == "zero":
            self.error = [-self.x for _ in hosted]
            self.x.zero_()
        self.work = [setup.theta.clone() for _ in hosted]
        self.server = torch.zeros_like(self.x) if options.two_way and options.server_residual else None
        self.lr = 0.0

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        found, o = no_feedback_over_shards(recipe, codec), recipe.method
        if o.two_way and (codec.shared_support or codec.collective):
            what = f"the mean of messages of {codec.label} is compressed already, so that two_way changes nothing"
            found.append(Issue("method.two_way", what, True, "set method.two_way=false"))
        elif o.two_way and not o.server_residual and codec.biased:
            what = f"two_way with the biased codec {codec.label} loses what the server leaves out, and diverges from y"
            found.append(Issue("method.server_residual", what, False, "allowed: method.server_residual=true, or an unbiased codec"))
        if o.local_optimizer == "adagrad" and recipe.optimizer.momentum:
            hint = "set optimizer.momentum=0"
            found.append(Issue("optimizer.momentum", "adagrad as the local optimizer has none", recipe.optimizer.momentum, hint))
        return found

    def notes(self) -> list[str]:
        zero = (
            ["init: zero, so the first messages hold the initial weights (an artefact of the authors' code)"]
            if self.options.init == "zero"
            else []
        )
        return not_contractive(self.setup.exchange.codec) + zero

    def point(self, worker: int) -> Tensor:
        return self.work[worker - self.setup.workers.hosted.start]

    def exchanges(self, step: int) -> bool:
        return bool((step + 1) % self.options.period == 0)

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        if step % self.options.period == 0:
            self.lr = lr  # changed at exchanges only, as in the authors' code
        due = self.exchanges(step)
        for slot, grad in enumerate(grads):
            update = self.update(slot, grad)
            self.error[slot].add_(update, alpha=self.lr)
            if not due:
                self.work[slot].add_(update, alpha=-self.lr)
        if due:
            self.exchange(step // self.options.period)

    def update(self, slot: int, grad: Tensor) -> Tensor:
        """u^k: local heavy ball (Nesterov if the optimizer says so), or Adagrad, on the gradient with weight decay at p."""
        o = self.setup.optimizer
        if o.weight_decay:
            grad.add_(self.work[slot], alpha=o.weight_decay)
        if self.options.local_optimizer == "adagrad":
            self.velocity[slot].addcmul_(grad, grad)
            return grad.div_(self.velocity[slot].sqrt().add_(_EPS))
        self.velocity[slot].mul_(o.momentum).add_(grad)
        return grad.add_(self.velocity[slot], alpha=o.momentum) if o.nesterov else self.velocity[slot]

    def exchange(self, number: int) -> None:
        """Exchange ``number`` (0, 1, ...): compress, apply, average if due, and place the workers."""
        o, exchange = self.options, self.setup.exchange
        key = self.setup.ctx.key("round", number)
        self.x.sub_(exchange.two_way(self.error, self.server, key) if o.two_way else self.send(key))
        if o.average_every and (number + 2) % o.average_every == 0:  # before the next gradient, whose number is number + 1
            self.error = self.spread(exchange.average(self.error, "averaging"))
            if o.average_momentum:
                self.velocity = self.spread(exchange.average(self.velocity, "averaging"))
        if o.reset_every and (number + 2) % o.reset_every == 0:
            for error in self.error:
                error.zero_()
        self.place()

    def send(self, key: Any) -> Tensor:
        """One-way: c, with every worker's residual left in ``error``."""
        return self.setup.exchange.feedback(self.error, key).mean

    def place(self) -> None:
        """p^k <- x - lambda e^k."""
        for slot, error in enumerate(self.error):
            torch.sub(self.x, error, alpha=self.coeff, out=self.work[slot])

    def spread(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.clone() for _ in self.setup.workers.hosted]

    def virtual(self) -> Tensor:
        """y. Its reduction is measurement, not training, and is not counted."""
        workers = self.setup.workers
        y = self.x - workers.mean(self.error)
        return y if self.server is None else y.sub_(workers.broadcast(self.server.clone()))

    def deploy(self) -> dict[str, Tensor]:
        points = {"x": self.x, "y": self.virtual()}
        first = self.options.eval_point
        if first == "local":
            points["local"] = self.setup.workers.broadcast(self.work[0].clone())
        return {first: points.pop(first), **points}

    def planned_bits(self, steps: int) -> dict[str, tuple[int, int]]:
        o, exchange, length = self.options, self.setup.exchange, self.x.numel()
        count = steps // o.period
        up, down = self.message_bits(length)
        parts = {"gradient": (count * up, count * down)}
        if o.average_every:
            times = ((count + 1) // o.average_every - 1 // o.average_every) * (2 if o.average_momentum else 1) if count else 0
            up, down = exchange.dense_bits(length)
            parts["averaging"] = (times * up, times * down)
        return parts

    def message_bits(self, length: int) -> tuple[int, int]:
        if self.options.two_way:
            both = self.setup.workers.count * self.setup.exchange.codec.payload_bits(length)
            return both, both
        return self.setup.exchange.bits(length)

    def diagnostics(self) -> dict[str, float]:
        norms = self.setup.workers.objects([float(torch.linalg.vector_norm(e)) for e in self.error])
        return {"residual_norm": sum(norms) / len(norms)}

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        rows = zip(self.setup.workers.hosted, self.error, self.velocity, self.work, strict=True)
        return {"x": self.x, "lr": self.lr, "server": self.server}, {w: {"error": e, "velocity": v, "work": p} for w, e, v, p in rows}

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.lr, left = shared["lr"], shared["server"]
        states = [worker(w) for w in self.setup.workers.hosted]
        self.error, self.velocity, self.work = ([s[name] for s in states] for name in ("error", "velocity", "work"))
        if left is not None and self.server is not None:
            self.server = left
        elif left is not None:  # another run's server went before: what it left out is the workers' now, and y stays
            self.error = [error + left for error in self.error]
