"""The recipe of `xutrain pretrain`: data, model, base optimizer of each worker, and what happens when a round of local steps ends."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from xutrain import registry
from xutrain.errors import Issue
from xutrain.recipe.quantize import DataParallelRecipe
from xutrain.recipe.schema import Eval, Options, Schedule

#: (beta1, beta2) where the recipe gives none
_BETAS = {"adamw": (0.9, 0.95), "lion": (0.9, 0.99)}
#: options that only some base optimizers have
_GOES_WITH = {
    "betas": ("adamw", "lion"),
    "eps": ("adamw",),
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
    "torch_options": ("torch",),
}


class PretrainOptimizer(Options):
    """The base optimizer that every worker runs by itself; its state is never averaged and never reset."""

    name: Literal["adamw", "sgd", "lion", "torch"] = Field("adamw", description="torch: any class of torch.optim, see torch_class")
    lr: float = Field(3e-3, gt=0, le=1e6, description="learning rate at the schedule's factor 1 (gamma)")
    weight_decay: float = Field(0.1, ge=0, le=1e3, description="adamw, lion: decoupled; sgd: L2 penalty added to the gradient")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="what weight_decay acts on: tensors of two dimensions or more, or all"
    )
    betas: tuple[float, float] | None = Field(None, description="adamw (null: 0.9, 0.95) and lion (null: 0.9, 0.99)", strict=False)
    eps: float = Field(1e-8, gt=0, le=1, description="adamw: added to the root of the second moment")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: heavy-ball momentum")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    torch_class: str = Field("", description="torch: name of the class in torch.optim, for example Adagrad")
    torch_options: dict[str, Any] = Field(default_factory=dict, description="torch: further arguments of that class")

    @property
    def moments(self) -> tuple[float, float]:
        """(beta1, beta2), the default of ``name`` filled in."""
        return self.betas or _BETAS.get(self.name, (0.9, 0.95))

    def issues(self, where: str) -> list[Issue]:
        found = []
        if self.betas is not None and not all(0 <= b < 1 for b in self.betas):
            found.append(Issue(f"{where}.betas", "must be two numbers in [0, 1)", list(self.betas), "for example [0.9, 0.95]"))
        if (self.name == "torch") != bool(self.torch_class):
            hint = f"for example {where}.name=torch {where}.torch_class=Adagrad"
            found.append(Issue(f"{where}.torch_class", f"goes with {where}.name=torch, and only with it", self.torch_class, hint))
        for key, names in _GOES_WITH.items():
            value, default = getattr(self, key), type(self).model_fields[key].get_default(call_default_factory=True)
            if value != default and self.name not in names:
                what = f"is no option of {self.name}, only of {' and '.join(names)}"
                found.append(Issue(f"{where}.{key}", what, value, f"leave it out, or set {where}.name={names[0]}"))
        if self.nesterov and not self.momentum:
            found.append(Issue(f"{where}.nesterov", f"needs {where}.momentum", self.nesterov, f"for example {where}.momentum=0.9"))
        return found


class PretrainEval(Eval):
    """When the global model x_{t,0} is measured. The end of the run is always measured."""

    every_epochs: float | None = Field(None, gt=0, description="epochs between evaluations; null: as `every` says")
    every: int | None = Field(None, ge=1, description="steps between evaluations, a multiple of method.local_steps")
    batch_size: int = Field(64, ge=1, description="windows per forward pass")


class PretrainRecipe(DataParallelRecipe):
    """`xutrain pretrain`: DSM and its baselines."""

    optimizer: PretrainOptimizer = PretrainOptimizer()  # type: ignore[assignment]
    schedule: Schedule = Schedule(name="cosine", warmup_steps=50, floor=0.05)
    eval: PretrainEval = PretrainEval()

    @property
    def local_steps(self) -> int:
        """Steps of a round; 1 for methods that exchange every step."""
        return int(getattr(self.method, "local_steps", 1))

    def issues(self) -> list[Issue]:
        found = [*super().issues(), *self.optimizer.issues("optimizer")]
        tau, steps, name = self.local_steps, self.train.steps, self.method.name
        if name in ("adamw", "lion") and self.optimizer.name != name:
            found.append(
                Issue(
                    "optimizer.name",
                    f"method {name} applies {name} to the averaged gradient",
                    self.optimizer.name,
                    f"set optimizer.name={name}",
                )
            )
        if steps is not None and tau > steps:
            hint = f"lower method.local_steps to at most {steps}, or raise train.steps"
            found.append(Issue("method.local_steps", f"a round is longer than the run of {steps} steps", tau, hint))
        elif steps is not None and steps % tau and getattr(self.method, "last_round", "") == "refuse":
            near = f"train.steps={steps // tau * tau} or {-(-steps // tau) * tau}, or method.last_round=average"
            found.append(Issue("train.steps", f"is no multiple of method.local_steps={tau}", steps, near))
        every = self.eval.every
        if every is not None and every % tau:
            hint = f"eval.every={max(1, every // tau) * tau}: the global model exists at the ends of rounds"
            found.append(Issue("eval.every", f"is no multiple of method.local_steps={tau}", every, hint))
        shards = getattr(self.method, "shards", None)
        if shards is not None and shards > self.workers:
            found.append(Issue("method.shards", f"more shards than workers={self.workers}", shards, f"method.shards={self.workers}"))
        if getattr(self.method, "downlink", "fp32") == "sign" and shards is None:
            hint = f"method.shards=1 (one server) or up to {self.workers} (a shard each)"
            found.append(Issue("method.downlink", "signs travel back from an owner of the global state, and there is none", "sign", hint))
        if getattr(self.method, "clip_by", "max") == "l2" and getattr(self.method, "clip", None) and shards is not None:
            hint = "method.clip_by=max, or method.shards=null"
            found.append(Issue("method.clip_by", "the norm of a tensor is not known to the owner of a part of it", "l2", hint))
        if getattr(self.method, "error_feedback", False):
            codec = registry.load("codec", self.codec.name)(self.codec, workers=self.workers)
            found += registry.load("method", name, verb="pretrain").unsound(self, codec)
        if shards is not None and self.exchange.mode in ("alltoall", "auto"):
            found.append(Issue("exchange.mode", "shards have their own exchange", self.exchange.mode, "leave exchange.mode out"))
        return found
