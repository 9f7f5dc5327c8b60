"""The recipe of `xutrain quantize`; `sparsify` and `pretrain` share its sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from xutrain import registry
from xutrain.errors import Issue
from xutrain.recipe.schema import Choice, Eval, Named, Optimizer, Options, Recipe, Schedule, Train


class Exchange(Options):
    """How the workers' messages become one mean."""

    mode: Literal["allgather", "alltoall", "ps", "auto"] = Field(
        "allgather",
        description="allgather: all decode all; alltoall: each averages and re-encodes a shard; ps: a server decodes and sends fp32 back; "
        "auto: all-reduce where messages add, else the cheaper of the first two",
    )
    reduction: Literal["exact", "ring"] = Field(
        "exact",
        description="exact: added in worker order, bit-equal on any processes; ring: plain all-reduce (fp and shared-support codecs)",
    )
    bandwidth: float = Field(1e9, gt=0, description="auto: bits per second of a worker's link, in each direction")
    latency: float = Field(5e-5, ge=0, description="auto: seconds of a message, however short")

    @model_serializer(mode="wrap")
    def _as_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A link that decides nothing is no part of what is computed, nor of its identity."""
        value: dict[str, Any] = handler(self)
        return value if self.mode == "auto" else {k: v for k, v in value.items() if k not in ("bandwidth", "latency")}


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

    def issues(self) -> list[Issue]:
        found = super().issues()
        if getattr(self.method, "error_feedback", False):
            codec = registry.load("codec", self.codec.name)(self.codec, workers=self.workers)
            found += registry.load("method", self.method.name, verb="quantize").unsound(self, codec)
        return found
