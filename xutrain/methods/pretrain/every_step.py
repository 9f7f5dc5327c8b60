"""Data-parallel baselines that exchange gradients every step: AdamW, and Lion (arXiv 2302.06675).

    G = mean_i Q(g^i), clipped to train.clip_norm after averaging;  one optimizer step on the common model
    adamw   m <- b1 m + (1 - b1) G;  v <- b2 v + (1 - b2) G^2;  x <- (1 - lr wd) x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    lion    x <- (1 - lr wd) x - lr sign(b1 m + (1 - b1) G);  m <- b2 m + (1 - b2) G

wd acts on the tensors that optimizer.decay names. With ``error_feedback`` each worker sends Q(g^i + e^i) and keeps what it lost.
Traffic is local_steps times that of local steps.

Limits: codec fp (Q(g) = g) is the optimizer itself on the averaged gradient; Lion is then DSM with one local SGD step (the same
decay, no clipping).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from xutrain.engine.base_optimizers import base_optimizer
from xutrain.engine.replica import clip_norm
from xutrain.methods.base import Setup
from xutrain.methods.pretrain.feedback import FeedbackOptions, WithFeedback
from xutrain.registry import method


class EveryStep(WithFeedback):
    """One base optimizer, the same on all workers, fed with the averaged gradient."""

    clips_itself = True

    class Options(FeedbackOptions):
        pass

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.base = base_optimizer(setup.optimizer, setup.layout, self.x)  # type: ignore[arg-type]

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        self.add_left_out(grads)
        result = self.setup.exchange.mean(grads, self.setup.ctx.key("step", step), want_sent=bool(self.error))
        self.keep_left_out(grads, result.sent)
        self.base.step(self.x, clip_norm(result.mean, self.setup.recipe.train.clip_norm), lr)

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        workers = {w: {"error": e} for w, e in zip(self.setup.workers.hosted, self.error, strict=False)}
        return {"x": self.x, "base": self.base.state()}, workers

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        super().load_state(shared, worker)
        self.base.load_state(shared["base"])
        self.error = [worker(w)["error"] for w in self.setup.workers.hosted] if self.options.error_feedback else []


@method("pretrain", "adamw", summary="baseline: AdamW on the gradient averaged every step", aliases=("adamw_ddp",))
class AdamW(EveryStep):
    class Options(EveryStep.Options):
        pass


@method("pretrain", "lion", paper="2302.06675", summary="baseline: Lion on the gradient averaged every step", aliases=("lion_ddp",))
class Lion(EveryStep):
    class Options(EveryStep.Options):
        pass
