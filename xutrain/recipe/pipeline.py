"""The recipe of `xutrain pipeline`: a network cut into stages, a method that says what each stage does when."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from xutrain.errors import Issue, RecipeError
from xutrain.recipe.schema import Choice, Eval, Named, Optimizer, Options, Recipe, Schedule, Train


class Split(Options):
    """Where the network is cut into stages."""

    by: Literal["layers", "parameters", "time"] = Field(
        "layers",
        description="layers: ceil(L/K) layers a stage; parameters: the largest stage as small as can be; time: the same by measured time",
    )
    cuts: list[Annotated[int, Field(ge=1)]] | None = Field(None, description="first layer of the stages 1..K-1; wins over by")


class Straggler(Options):
    """Each stage is slowed in each iteration, independently, with a probability; real sleep, numbers unchanged."""

    probability: float = Field(0.0, ge=0, le=1, description="chance that a stage is slowed in an iteration; 0 is off")
    slowdown: float = Field(1.0, ge=0, le=1000, description="s: a slowed iteration takes 1 + s times as long")
    seed: int = Field(0, ge=0, description="seed of the slow-downs, apart from the run's")


class Runtime(Options):
    """How the stages run; changes speed, and with ``drain`` where the queues are emptied."""

    drain: Literal["checkpoint", "epoch", "end"] = Field(
        "checkpoint",
        description="when the queues run empty: at checkpoint.every, every epoch, or the end alone (checkpoints then hold them)",
    )
    take: Literal["late", "together"] = Field(
        "late",
        description="late: forward and send before the error gradient is awaited; together: await both first, as the time law has it",
    )
    poll: int = Field(50, ge=1, description="ticks between agreements on a request to stop, where there are several processes")
    planned_s: float | None = Field(
        None, gt=0, description="seconds per batch that `xutrain pipeline plan` predicted, shown beside the measured ones"
    )
    unit_ms: float = Field(
        0.0,
        ge=0,
        le=60000,
        description="pad the stages by sleep to this many milliseconds per unit of work (forward 1, recomputation 1, backward 2)",
    )


class StageOptimizer(Optimizer):
    """Each stage's own optimizer, applied to its own gradient."""

    name: Literal["sgd", "adam"] = Field(  # type: ignore[assignment]
        "sgd", description="sgd with momentum, as in the paper; adam is outside the paper's analysis"
    )
    beta2: float = Field(0.999, ge=0, lt=1, description="adam: second-moment decay; momentum is the first")
    eps: float = Field(1e-8, gt=0, description="adam: added to the denominator")


class PipelineRecipe(Recipe):
    """`xutrain pipeline`: DSP and its baselines."""

    data: Annotated[Named, Choice("dataset")]
    model: Annotated[Named, Choice("model")]
    stages: int = Field(3, ge=1, le=1024, description="K, consecutive blocks of the network; the number of processes must divide it")
    split: Split = Split()
    train: Train = Train()
    optimizer: StageOptimizer = StageOptimizer()
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    runtime: Runtime = Runtime()
    straggler: Straggler = Straggler()
    method: Annotated[Named, Choice("method", default="dsp")]

    @property
    def participants(self) -> int:
        return self.stages

    @property
    def participants_key(self) -> str:
        return "stages"

    def also_computes(self) -> dict[str, Any]:
        """Where the queues run empty."""
        drains = self.runtime.drain == "checkpoint" and self.checkpoint.every is not None
        return {"checkpoint.every": self.checkpoint.every} if drains else {}

    def issues(self) -> list[Issue]:
        found = [*super().issues(), *self.train.issues("train"), *self.schedule.issues("schedule")]
        try:
            self.method.delays(self.stages)  # type: ignore[attr-defined]
        except RecipeError as error:
            found += error.issues
        more = getattr(self.method, "issues", None)
        found += more(self.stages, self.train.batch_size) if more else []
        cuts = self.split.cuts
        if cuts is not None and (len(cuts) != self.stages - 1 or sorted(set(cuts)) != cuts):
            found.append(
                Issue(
                    "split.cuts",
                    f"must be {self.stages - 1} rising layer numbers for stages={self.stages}",
                    cuts,
                    "leave it out to cut by split.by",
                )
            )
        if self.train.buffers != "mean":
            found.append(
                Issue(
                    "train.buffers",
                    "has no meaning in a pipeline: every stage owns its batch-norm statistics",
                    self.train.buffers,
                    "leave it out",
                )
            )
        if self.train.accumulate != 1:
            what = "a stage applies the gradient of every batch"
            found.append(Issue("train.accumulate", what, self.train.accumulate, "method=gpipe method.micro_batches=N splits a batch"))
        if self.train.precision != "fp32":
            found.append(Issue("train.precision", "a pipeline runs in fp32", self.train.precision, "leave it out"))
        return found
