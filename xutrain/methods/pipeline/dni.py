"""DNI: decoupled neural interfaces, synthetic gradients (Jaderberg et al., ICML 2017).

    g^_{k+1} = M_k(h_{k+1}),    g^_K = dL/dh_K
    G_k = (dF_k/dw_k at (h_k, w_k))^T g^_{k+1},    g_k = (dF_k/dh_k at (h_k, w_k))^T g^_{k+1}
    M_k <- Adam on mean (M_k(h_{k+1}) - g_{k+1})^2,    when stage k+1 has sent g_{k+1} back

Stage k forwards a batch, asks its synthesizer M_k for g^, goes backward on g^ and updates at once: no staleness, but an error
in the gradient. What stage k+1 sends back follows from its own synthetic gradient, or from the loss. M_k: two hidden layers
(5x5 convolutions on images) with normalisation and ReLU, and a zero output layer, so the first gradients are zero. Our
choices: mean squared error, Adam for M_k.

Limits: one stage is back-propagation; until M_k's first step the gradient of stage k is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.methods.pipeline.base import Applied, Kept, PipelineMethod, Stage, State
from xutrain.recipe.delays import Delays, dsp
from xutrain.registry import Named, method


@method("pipeline", "dni", paper="1608.05343", summary="decoupled neural interfaces: synthetic gradients, no staleness")
class DNI(PipelineMethod):
    class Options(Named):
        name: str = "dni"
        synthesizer_lr: float = Field(1e-3, gt=0, le=10, description="Adam's learning rate for the synthesizers")
        hidden: int = Field(128, ge=1, le=65536, description="width of a synthesizer's hidden layers")

        def delays(self, stages: int) -> Delays:
            up = dsp(None, None, None, stages).p
            return Delays(up, (2,) * (stages - 1) + (0,), local=True)

    options: Any

    def prepare(self, stage: Stage, output: Tensor) -> None:
        if stage.last:
            return
        if output.dim() in (2, 4) and output.numel() == output.shape[1]:  # one sample of one pixel
            what = "the synthesizers of flat activations normalise over a batch of at least 2 samples"
            raise RecipeError(Issue("train.batch_size", what, len(output), "train.batch_size=2"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Key(stage.seed, "synthesizer", 0, stage.index).integer)
            model = synthesizer(tuple(output.shape), self.options.hidden).to(output)
        stage.memory["model"] = model
        stage.memory["optimizer"] = torch.optim.Adam(model.parameters(), lr=self.options.synthesizer_lr, foreach=False)

    def forward(self, stage: Stage, f: int, x: Tensor) -> Tensor | None:
        leaf = stage.leaf(x)
        outputs = stage.call(leaf, f)
        g = None
        if not stage.last:
            with torch.no_grad():
                g = stage.memory["model"](outputs)
            stage.keep(Kept(f, stage.updates, outputs.detach()))
        stage.memory["down"] = stage.pull(outputs, leaf, f, g)
        stage.applied.append(Applied(stage.index, f, stage.updates, stage.updates, stage.updates))
        return None if stage.last else outputs.detach()

    def backward(self, stage: Stage, f: int | None, b: int | None, g: Tensor | None) -> Tensor | None:
        if b is not None and not stage.last:
            assert g is not None
            kept = stage.release(b)
            stage.memory["optimizer"].zero_grad()
            nn.functional.mse_loss(stage.memory["model"](kept.inputs), g).backward()
            stage.memory["optimizer"].step()
        down = stage.memory.pop("down", None)
        assert down is None or isinstance(down, Tensor)
        return down

    def target(self, stage: Stage, f: int | None, b: int | None) -> int | None:
        return f

    def state(self, stage: Stage) -> State:
        if stage.last:
            return {}
        return {"model": dict(stage.memory["model"].state_dict()), "optimizer": stage.memory["optimizer"].state_dict()}

    def load_state(self, stage: Stage, state: State) -> None:
        if state:
            stage.memory["model"].load_state_dict(state["model"])
            stage.memory["optimizer"].load_state_dict(state["optimizer"])


def synthesizer(shape: tuple[int, ...], hidden: int) -> nn.Module:
    """M: activations of ``shape`` (batch first) -> a gradient of the same shape, zero at first."""
    out: nn.Module
    if len(shape) == 4:
        width = shape[1]
        out = nn.Conv2d(width, width, 5, padding=2)
        body = [nn.Conv2d(width, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        body += [nn.Conv2d(width, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
    else:
        norm = nn.BatchNorm1d if len(shape) == 2 else nn.LayerNorm
        out = nn.Linear(hidden, shape[-1])
        body = [nn.Linear(shape[-1], hidden), norm(hidden), nn.ReLU(), nn.Linear(hidden, hidden), norm(hidden), nn.ReLU()]
    for parameter in out.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(*body, out)
