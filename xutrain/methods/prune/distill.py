"""Expert-wise distillation of a pruned model from the dense one (arXiv:2410.12013, eq. 10), masks kept.

    L = L_CE + lambda L_expert,   L_expert = sum_layers sum_experts MSE(E_i^teacher(x), E_i^student(x))

lambda = L_CE / L_expert at the first step, then fixed. Outputs are compared before the router weight, over the tokens that
the teacher routes to expert i (``tokens: both``: teacher and student), each model on its own hidden states (``inputs: own``)
or both on the teacher's (``inputs: teacher``: no gradient crosses layers). Limit: nothing pruned gives L_expert = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xutrain.methods.prune.masks import read_masks
from xutrain.models.decoder import Decoder
from xutrain.models.moe import Architecture


def rate(options: Any, step: int) -> float:
    """Learning rate of a step: linear warm-up times a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, round(options.warmup * options.steps)))
    return float(options.lr * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps)))


def expert_loss(
    student: Decoder, teacher: Decoder, own: list[Any], theirs: list[Any], tokens: str = "teacher", inputs: str = "own"
) -> Tensor:
    """L_expert of one batch; ``own`` and ``theirs`` are the traces (x, index, weight, prob) of student and teacher."""
    total = own[0][0].new_zeros(())
    sparse = [(student.layers[i], teacher.layers[i]) for i in student.arch.pruned_layers]
    for (mine, its), (xs, index_s, _, _), (xt, index_t, _, _) in zip(sparse, own, theirs, strict=True):
        for e, (expert, model) in enumerate(zip(experts_of(mine), experts_of(its), strict=True)):
            reached = (index_t == e).any(1)
            if tokens == "both":
                reached = reached & (index_s == e).any(1)
            if bool(reached.any()):
                with torch.no_grad():
                    target = model(xt[reached])
                total = total + F.mse_loss(expert((xt if inputs == "teacher" else xs)[reached]), target)
    return total


def experts_of(layer: Any) -> list[nn.Module]:
    """The routed experts of a layer; the MLP of a dense model is its one expert."""
    return list(layer.block.experts) if layer.sparse else [layer.mlp]


@dataclass
class Losses:
    """Of one step: cross entropy, expert loss, and the factor between them."""

    ce: float
    expert: float
    factor: float


class Distiller:
    """A student with masks, its teacher, an optimizer. ``masks``: parameter name -> bool, True = kept, from the pruning step."""

    def __init__(self, student: Decoder, teacher: Decoder, masks: dict[str, Tensor], options: Any) -> None:
        self.student, self.teacher, self.options = student, teacher.eval(), options
        parameters = dict(student.named_parameters())
        self.masks = [(parameters[name], mask) for name, mask in masks.items()]
        experts = {name for layer in range(student.arch.layers) for name in student.arch.expert_names(layer)}
        for name, parameter in parameters.items():
            parameter.requires_grad_(options.train == "all" or name in experts)
        trained = [p for p in parameters.values() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)
        self.factor: float | None = None if options.expert_loss == "auto" else float(options.expert_loss)
        self.hold()

    def hold(self) -> None:
        """Zero what is dropped: momentum and weight decay would otherwise bring it back."""
        with torch.no_grad():
            for parameter, mask in self.masks:
                parameter.mul_(mask)

    def step(self, batch: Tensor, lr: float) -> Losses:
        """One step on token ids (b, s + 1)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        own: list[Any] = []
        theirs: list[Any] = []
        logits = self.student(batch[:, :-1], own)
        ce = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss, expert = ce, ce.new_zeros(())
        if self.factor != 0:
            with torch.no_grad():
                self.teacher(batch[:, :-1], theirs)
            expert = expert_loss(self.student, self.teacher, own, theirs, self.options.tokens, self.options.inputs)
            if self.factor is None:
                measured = float(expert.detach())
                self.factor = float(ce.detach()) / measured if measured > 0 else 0.0
            loss = ce + self.factor * expert
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, mask in self.masks:
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)
        nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.grad is not None], self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.hold()
        return Losses(float(ce.detach()), float(expert.detach()), self.factor or 0.0)


def masks_of(folder: Path, arch: Architecture) -> dict[str, Tensor]:
    """The masks that a pruning kept (``save_masks``), by parameter name. Not read off the values: a kept weight may be zero."""
    columns = {"gate": arch.hidden, "up": arch.hidden, "down": arch.ffn}
    return {
        arch.expert_name(layer, e, role): mask
        for layer in arch.pruned_layers
        for e in range(arch.experts)
        for role, mask in read_masks(folder, layer, e, columns).items()
    }
