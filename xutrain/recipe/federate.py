"""The recipe of `xutrain federate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xutrain.errors import Issue
from xutrain.recipe.schema import Choice, Named, Options, Recipe, Schedule
from xutrain.recipe.search import Search, contradictions


class Clients(Options):
    """Who takes part."""

    count: int = Field(16, ge=1, le=10**6, description="Clients K; the number of processes must divide it.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that take part in a round, drawn anew each round.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability that a chosen client is lost in a round: it is sent the plan and never answers."
    )
    weights: Literal["equal", "samples"] = Field("equal", description="p_k in the average: 1/K, or the client's share of the samples.")
    steps: Literal["equal", "own"] = Field(
        "equal",
        description="equal: all do the smallest client's number of steps, each pass a new draw of its samples; own: each client its own.",
    )
    val_fraction: float = Field(0.0, ge=0, lt=1, description="Part of each client's samples that it keeps aside for validation of its own.")


class FederatedTrain(Options):
    """How long, and what a local step is."""

    rounds: int = Field(ge=1, le=10**8, description="Rounds R.")
    local_epochs: float = Field(
        1.0, gt=0, le=1e5, description="Passes E over the client's samples in a round; 0.5 goes on where it stopped."
    )
    local_steps: int | None = Field(None, ge=1, le=10**8, description="Local steps P of a round; wins over local_epochs.")
    batch_size: int = Field(32, ge=1, le=10**7, description="Samples of a local step.")
    lr: float = Field(0.1, gt=0, le=1e6, description="Local learning rate at the schedule's factor 1.")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="What a local step is; adam with beta .9 and .999, eps 1e-8, no decay.")
    reset_optimizer: bool = Field(False, description="Adam's moments start anew each round; else each client keeps its own.")
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="L2 penalty, part of the local gradient.")
    clip_norm: float | None = Field(None, gt=0, description="Clip each local gradient to this L2 norm.")
    buffers: Literal["mean", "local"] = Field(
        "mean", description="Batch-norm statistics: mean of the clients' after a round; local: never sent (measured at their mean)."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast the forward pass; weights stay fp32.")
    entropy_coef: float = Field(
        0.0, ge=0, le=1e3, description="Adds coef * max(0, entropy_target - mean softmax entropy in nats) to the loss (Auto-FedRL's code)."
    )
    entropy_target: float = Field(2.0, ge=0, description="Entropy below which the term above acts.")


class FederatedEval(Options):
    """When the server's model is measured. The last round always is."""

    every: int = Field(1, ge=1, description="Rounds between measurements on the test split.")
    batch_size: int = Field(500, ge=1, description="Samples per forward pass.")
    sites: Literal["seen", "unseen", "all"] = Field(
        "seen", description="Segmentation: whose test cases make test_dice: of sites that train, that do not, or both."
    )
    hausdorff: bool = Field(True, description="Segmentation: measure the 95 % Hausdorff distance at the end.")
    overlays: int = Field(2, ge=0, le=20, description="Segmentation: pictures of prediction and truth a site at the end.")


class Uplink(Options):
    """What happens to a client's vectors before they travel; the codec is chosen beside it."""

    error_feedback: Literal["auto", "always", "never"] = Field(
        "auto", description="Add what the codec lost last time; auto: where the codec is contractive and biased."
    )


class FederateRecipe(Recipe):
    """`xutrain federate`: DOMO, FedSM, Auto-FedRL and their baselines."""

    data: Annotated[Named, Choice("dataset")]
    model: Annotated[Named, Choice("model")]
    partition: Annotated[Named, Choice("partition", default="similarity")]
    clients: Clients = Clients()
    train: FederatedTrain
    schedule: Schedule = Schedule()
    eval: FederatedEval = FederatedEval()
    method: Annotated[Named, Choice("method", default="domo")]
    codec: Annotated[Named, Choice("codec", default="fp")]
    uplink: Uplink = Uplink()
    search: Search | None = Field(None, description="An agent that draws hyper-parameters of every round; null: none.")

    @property
    def participants(self) -> int:
        return self.clients.count

    @property
    def participants_key(self) -> str:
        return "clients.count"

    @property
    def per_round(self) -> int:
        """How many clients take part in a round."""
        return max(1, round(self.clients.fraction * self.clients.count))

    def issues(self) -> list[Issue]:
        return [*super().issues(), *self.schedule.issues("schedule"), *(contradictions(self) if self.search is not None else [])]
