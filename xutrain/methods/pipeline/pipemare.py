"""PipeMare: asynchronous pipeline with one weight copy and two corrections, each a switch (Yang et al., MLSys 2021).

    G_k(b) = (dF_k/dw_k at (h_k, u))^T g_{k+1},    g_k = (dF_k/dh_k at (h_k, u))^T g_{k+1},    w <- step(w, G_k(b), alpha_k)
    T1 (learning-rate rescheduling)     alpha_k = alpha / tau_k^e,    e = 1 - min(b / anneal, 1)
    T2 (discrepancy correction)         u = w - tau_k d,    d <- gamma d + (1 - gamma)(w_new - w_old),    gamma = D^(1/tau_k)

On DSP's time table, tau_k = m_k. The backward pass uses u, an estimate of the weights that forwarded the batch; w and d are
stage k's own. The last stage, tau = 0, has neither correction. The formulas are from memory of the paper, not seen.

Limits: both switches off is DSP; one stage is back-propagation; lr = 0 gives exactly the gradient of back-propagation.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from xutrain.methods.pipeline.base import Stage, State
from xutrain.methods.pipeline.dsp import Replay
from xutrain.recipe.delays import Delays, dsp
from xutrain.registry import Named, method


@method("pipeline", "pipemare", paper="1910.05124", summary="one weight copy, learning-rate rescheduling and discrepancy correction")
class PipeMare(Replay):
    class Options(Named):
        name: str = "pipemare"
        p: list[int] | None = Field(None, description="forward delays in ticks, one per stage, the last 0; default all 1")
        m: list[int] | None = Field(None, description="staleness of each stage, the last 0; default the smallest valid")
        t1: bool = Field(True, description="divide the learning rate of early training by the staleness")
        anneal: int = Field(500, ge=1, description="T1: batches after which the division has faded out")
        t2: bool = Field(True, description="correct the weights of the backward pass towards those of the forward pass")
        decay: float = Field(0.135, gt=0, lt=1, description="T2: D, what remains of an old step after tau_k updates")

        def delays(self, stages: int) -> Delays:
            return dsp(self.p, None, self.m, stages)

    options: Any

    def rate(self, stage: Stage, batch: int) -> float:
        tau = self.delays.m[stage.index]
        return float(tau ** -(1 - min(batch / self.options.anneal, 1))) if self.options.t1 and tau else 1.0

    def _corrects(self, stage: Stage) -> bool:
        return bool(self.options.t2 and self.delays.m[stage.index])

    def weights(self, stage: Stage) -> dict[str, Tensor] | None:
        if not self._corrects(stage):
            return None
        if "drift" not in stage.memory:
            stage.memory["before"] = {n: p.detach().clone() for n, p in stage.parameters.items()}
            stage.memory["drift"] = {n: p.new_zeros(p.shape) for n, p in stage.memory["before"].items()}
        tau, drift = self.delays.m[stage.index], stage.memory["drift"]
        return {n: (p.detach() - tau * drift[n]).requires_grad_() for n, p in stage.parameters.items()}

    def applied(self, stage: Stage) -> None:
        if not self._corrects(stage):
            return
        gamma = self.options.decay ** (1 / self.delays.m[stage.index])
        for name, parameter in stage.parameters.items():
            before = stage.memory["before"][name]
            stage.memory["drift"][name].mul_(gamma).add_(parameter.detach() - before, alpha=1 - gamma)
            before.copy_(parameter.detach())

    def state(self, stage: Stage) -> State:
        return dict(stage.memory)

    def load_state(self, stage: Stage, state: State) -> None:
        stage.memory.update(state)
