"""The recipe of `xutrain quantize`; `sparsify` and `pretrain` share its sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xutrain.errors import Issue
from xutrain.recipe.schema import Choice, Eval, Named, Optimizer, Options, Recipe, Schedule, Train


class Exchange(Options):
    """How the workers' messages become one mean."""

    mode: Literal["allgather", "alltoall", "ps"] = Field(
        "allgather",
        description="allgather: all decode all; alltoall: each averages and re-encodes one shard; ps: a server decodes and sends fp32 back",
    )
    reduction: Literal["exact", "ring"] = Field(
        "exact",
        description="exact: added in worker order, bit-equal on any processes; ring: plain all-reduce (fp and shared-support codecs)",
    )


class DataParallelRecipe(Recipe):
    """Data, model, workers, schedule, method and codec of a data-parallel run."""

    data: Annotated[Named, Choice("dataset")]
    model: Annotated[Named, Choice("model")]
    workers: int = Field(4, ge=1, le=10**6, description="logical workers; the number of processes must divide it")
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    exchange: Exchange = Exchange()
    eval: Eval = Eval()
    method: Annotated[Named, Choice("method", default="sgd")]
    codec: Annotated[Named, Choice("codec", default="fp")]

    @property
    def participants(self) -> int:
        return self.workers

    def issues(self) -> list[Issue]:
        return [*super().issues(), *self.train.issues("train"), *self.schedule.issues("schedule")]


class QuantizeRecipe(DataParallelRecipe):
    """`xutrain quantize`: BinGrad, ORQ and their baselines."""
