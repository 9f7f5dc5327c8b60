"""Base optimizers of local steps on flat vectors: AdamW, SGD, Lion with torch's arithmetic, and any class of torch.optim.

Each worker owns one. ``step`` changes the worker's vector in place; ``state`` is what a checkpoint needs to go on bit by bit.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xutrain.engine.optim import FlatSGD
from xutrain.engine.replica import Slice
from xutrain.errors import Issue, RecipeError
from xutrain.recipe.pretrain import PretrainOptimizer
from xutrain.recipe.schema import Optimizer


class BaseOptimizer(Protocol):
    """What local steps ask of an optimizer."""

    def step(self, theta: Tensor, grad: Tensor, lr: float) -> None:
        """Change ``theta`` (shape (D,)) in place; ``grad`` is consumed."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take ``state()`` of an earlier process back."""


def base_optimizer(options: PretrainOptimizer, layout: list[Slice], like: Tensor | None = None) -> BaseOptimizer:
    """A fresh optimizer for one worker, whose vectors will be of the type and on the device of ``like`` (None: float32, CPU).

    Raises:
        RecipeError: a torch class or argument that does not exist.
    """
    if options.name == "adamw":
        return FlatAdamW(options, layout)
    if options.name == "lion":
        return FlatLion(options, layout)
    if options.name == "sgd":
        return DecayedSGD(options, layout)
    return TorchOptimizer(options, layout, like)


def decayed(layout: list[Slice], what: str) -> list[tuple[int, int]]:
    """Ranges of the flat vector on which weight decay acts; neighbours are joined."""
    ranges: list[tuple[int, int]] = []
    for part in layout:
        if what == "all" or len(part.shape) >= 2:
            if ranges and ranges[-1][1] == part.start:
                ranges[-1] = (ranges[-1][0], part.stop)
            else:
                ranges.append((part.start, part.stop))
    return ranges


def shrink(theta: Tensor, ranges: list[tuple[int, int]], factor: float) -> None:
    """Decoupled weight decay: multiply the ranges by ``factor`` in place."""
    if factor != 1.0:
        for start, stop in ranges:
            theta[start:stop].mul_(factor)


class FlatAdamW:
    """AdamW with decoupled decay; bit-equal to torch.optim.AdamW(foreach=False, fused=False) in float32."""

    def __init__(self, options: PretrainOptimizer, layout: list[Slice]) -> None:
        self.options, self.ranges = options, decayed(layout, options.decay)
        self.count = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def step(self, theta: Tensor, grad: Tensor, lr: float) -> None:
        beta1, beta2 = self.options.moments
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(theta), torch.zeros_like(theta)
        self.count += 1
        shrink(theta, self.ranges, 1 - lr * self.options.weight_decay)
        self.first.lerp_(grad, 1 - beta1)
        self.second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = torch.sqrt(self.second, out=grad).div_(math.sqrt(1 - beta2**self.count)).add_(self.options.eps)
        theta.addcdiv_(self.first, root, value=-(lr / (1 - beta1**self.count)))

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first, "second": self.second}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count, self.first, self.second = state["count"], state["first"], state["second"]


class FlatLion:
    """c = b1 m + (1-b1) g;  x <- (1 - lr wd) x - lr sign(c);  m <- b2 m + (1-b2) g  (arXiv 2302.06675)."""

    def __init__(self, options: PretrainOptimizer, layout: list[Slice]) -> None:
        self.options, self.ranges = options, decayed(layout, options.decay)
        self.momentum: Tensor | None = None

    def step(self, theta: Tensor, grad: Tensor, lr: float) -> None:
        beta1, beta2 = self.options.moments
        if self.momentum is None:
            self.momentum = torch.zeros_like(theta)
        shrink(theta, self.ranges, 1 - lr * self.options.weight_decay)
        theta.add_(torch.lerp(grad, self.momentum, beta1).sign_(), alpha=-lr)
        self.momentum.mul_(beta2).add_(grad, alpha=1 - beta2)

    def state(self) -> dict[str, Any]:
        return {"momentum": self.momentum}

    def load_state(self, state: dict[str, Any]) -> None:
        self.momentum = state["momentum"]


class DecayedSGD:
    """SGD with momentum, its L2 penalty on the chosen tensors only."""

    def __init__(self, options: PretrainOptimizer, layout: list[Slice]) -> None:
        self.options, self.ranges = options, decayed(layout, options.decay)
        self.sgd = FlatSGD(Optimizer(lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, weight_decay=0.0))

    def step(self, theta: Tensor, grad: Tensor, lr: float) -> None:
        if self.options.weight_decay:
            for start, stop in self.ranges:
                grad[start:stop].add_(theta[start:stop], alpha=self.options.weight_decay)
        self.sgd.step(theta, grad, lr)

    def state(self) -> dict[str, Any]:
        return self.sgd.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.sgd.load_state(state)


class TorchOptimizer:
    """Any optimizer of torch.optim, on parameters that are views of the worker's vector."""

    def __init__(self, options: PretrainOptimizer, layout: list[Slice], like: Tensor | None = None) -> None:
        self.options, self.layout = options, layout
        cls = getattr(torch.optim, options.torch_class, None)
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or options.torch_class in (
            "Optimizer",
            "LBFGS",
            "SparseAdam",
        ):
            hint = "a class of torch.optim that steps from gradients alone, for example Adagrad, NAdam or RMSprop"
            raise RecipeError(Issue("optimizer.torch_class", "no such optimizer", options.torch_class, hint))
        if "weight_decay" in options.torch_options:
            what, hint = "weight_decay has a key of its own", f"optimizer.weight_decay={options.torch_options['weight_decay']}"
            raise RecipeError(Issue("optimizer.torch_options", what, options.torch_options, hint))
        zero = torch.zeros(1) if like is None else like.new_zeros(1)  # state is made, and loaded, on the parameters' device
        self.parameters = [nn.Parameter(zero.new_zeros(part.shape)) for part in layout]
        matrices = [p for p in self.parameters if options.decay == "all" or p.ndim >= 2]
        others = [p for p in self.parameters if not (options.decay == "all" or p.ndim >= 2)]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        try:
            build: Any = cls  # every optimizer that is allowed here takes lr; the base class does not say so
            self.optimizer = build([g for g in groups if g["params"]], lr=options.lr, **options.torch_options)
        except (TypeError, ValueError) as reason:
            raise RecipeError(
                Issue("optimizer.torch_options", f"{options.torch_class} refuses them: {reason}", options.torch_options)
            ) from None
        if options.weight_decay and "weight_decay" not in self.optimizer.defaults:
            what = f"torch's {options.torch_class} has no weight decay"
            raise RecipeError(Issue("optimizer.weight_decay", what, options.weight_decay, "optimizer.weight_decay=0"))

    def step(self, theta: Tensor, grad: Tensor, lr: float) -> None:
        for parameter, part in zip(self.parameters, self.layout, strict=True):
            parameter.data = theta[part.start : part.stop].view(part.shape)
            parameter.grad = grad[part.start : part.stop].view(part.shape)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return dict(self.optimizer.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
