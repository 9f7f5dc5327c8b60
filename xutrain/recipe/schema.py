"""What a recipe may say: the sections that several verbs share. Torch-free; a verb's own recipe class is in <verb>.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from xutrain.errors import Issue
from xutrain.registry import Named, Options

__all__ = ["Checkpoint", "Choice", "Eval", "Log", "Named", "Optimizer", "Options", "Paper", "Recipe", "Schedule", "Train"]


@dataclass(frozen=True)
class Choice:
    """Marks a section whose options are those of the registered part that its ``name`` chooses.

    ``Annotated[Named, Choice("codec", default="fp")]``; a plain string in YAML stands for ``{name: string}``.
    """

    kind: str
    default: str | None = None


class Paper(Options):
    """Which published experiment a recipe stands for, and how sure we are of its settings."""

    id: str = Field(description="arXiv number")
    where: str = Field("", description="table, figure or section")
    provenance: Literal["seen", "inferred", "ours"] = Field(
        "ours", description="seen in the paper or its code; inferred from the authors' other code; our choice"
    )
    differences: list[str] = Field(default_factory=list, description="what differs from the published protocol")


class Optimizer(Options):
    """The base optimizer, applied to the exchanged gradient."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0, le=1e6, description="learning rate at the schedule's factor 1")
    momentum: float = Field(0.9, ge=0, lt=1, description="heavy-ball momentum")
    nesterov: bool = Field(False, description="Nesterov momentum")
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="L2 penalty added to the gradient")


class Schedule(Options):
    """Learning-rate factor over the run."""

    name: Literal["constant", "step", "cosine", "linear"] = "constant"
    milestones: list[float] = Field(default_factory=list, description="step: fractions of the run after which gamma is applied once more")
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor applied at each milestone")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up from 1/n to 1 over this many epochs")
    warmup_steps: int | None = Field(None, ge=0, description="linear warm-up in steps; wins over warmup_epochs")
    floor: float = Field(0.0, ge=0, le=1, description="cosine, linear: factor at the end of the run")
    decay_steps: int | None = Field(None, ge=1, description="cosine, linear: step at which the floor is reached; null: the end of the run")

    def issues(self, where: str) -> list[Issue]:
        bad = [m for m in self.milestones if not 0 < m < 1] or (self.milestones if sorted(self.milestones) != self.milestones else [])
        if bad:
            hint = "for example [0.5, 0.75] for epochs 100 and 150 of 200"
            return [Issue(f"{where}.milestones", "fractions of the run in rising order, between 0 and 1", self.milestones, hint)]
        return []


class Train(Options):
    """How long and with what batches."""

    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over the training data; or give steps")
    steps: int | None = Field(None, ge=1, le=10**12, description="optimizer steps; wins over epochs")
    batch_size: int = Field(32, ge=1, le=10**7, description="samples per worker and step")
    accumulate: int = Field(1, ge=1, le=10**6, description="split a worker's batch into this many forward passes and add their gradients")
    clip_norm: float | None = Field(None, gt=0, description="clip each worker's gradient to this L2 norm")
    buffers: Literal["mean", "first", "local"] = Field(
        "mean", description="batch-norm statistics: averaged over workers each step, worker 0's, or each worker's own"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast the forward pass; weights stay fp32")

    def issues(self, where: str) -> list[Issue]:
        if self.epochs is None and self.steps is None:
            return [Issue(where, "says neither epochs nor steps", hint=f"set {where}.epochs=10 or {where}.steps=1000", has_value=False)]
        if self.batch_size % self.accumulate:
            hint = f"{where}.batch_size={-(-self.batch_size // self.accumulate) * self.accumulate}, or a divisor of {self.batch_size}"
            return [Issue(f"{where}.accumulate", f"does not divide {where}.batch_size={self.batch_size}", self.accumulate, hint)]
        return []


class Eval(Options):
    """When the model is measured on held-out data. The end of the run is always measured."""

    every_epochs: float | None = Field(1.0, gt=0, description="epochs between evaluations; null: only at the end")
    every: int | None = Field(None, ge=1, description="steps between evaluations; wins over every_epochs")
    batch_size: int = Field(500, ge=1, description="samples per forward pass")


class Checkpoint(Options):
    """When state is saved. A run that is asked to stop always saves."""

    every: int | None = Field(None, ge=1, description="steps (rounds in federate) between checkpoints; null: at the end and on a stop")
    keep: int = Field(2, ge=1, description="how many checkpoints stay on disk")


class Log(Options):
    """Where records go besides metrics.jsonl; enters no identity."""

    every: int = Field(10, ge=1, description="steps between training-loss records")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="Weights & Biases")
    project: str = Field("xutrain", description="Weights & Biases project")
    tensorboard: bool = Field(False, description="write TensorBoard events into the run folder")


class Recipe(Options):
    """What every verb's recipe has. Unknown keys are errors at every level."""

    verb: str = Field("", description="the verb that runs this recipe; the folder under configs/ says it as well")
    summary: str = Field("", description="one line for listings")
    paper: Paper | None = None
    scale: Literal["cpu", "paper", "smoke"] = Field("cpu", description="cpu: minutes on two cores; paper: the published setting")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every random draw; enters no identity")
    plugins: list[str] = Field(default_factory=list, description="installed Python modules that register further parts")
    deterministic: bool = Field(True, description="torch's deterministic algorithms")
    threads: int = Field(1, ge=1, le=1024, description="intra-op threads per process; equal results need equal threads")
    smoke: dict[str, Any] = Field(default_factory=dict, description="overrides under --smoke")
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def participants(self) -> int:
        """Logical workers, clients, parties or stages; the number of processes must divide it."""
        return 1

    #: recipe key that sets ``participants``, for error messages
    @property
    def participants_key(self) -> str:
        return "workers"

    @property
    def method_name(self) -> str:
        return str(getattr(getattr(self, "method", None), "name", ""))

    @property
    def codec_name(self) -> str | None:
        codec = getattr(self, "codec", None)
        return None if codec is None else str(codec.name)

    def also_computes(self) -> dict[str, Any]:
        """Keys of sections that only watch a run, where this recipe computes with them all the same; they enter its identity."""
        return {}

    def issues(self) -> list[Issue]:
        """Everything wrong between keys that are right alone."""
        return []
