"""A federated method put under the agent that a recipe's ``search`` section asks for, and the picture of what it did."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xutrain import registry
from xutrain.engine.evaluate import evaluate
from xutrain.engine.record import Record
from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.loops.clients import Bench, Shard
from xutrain.methods.federate.base import FederatedMethod
from xutrain.methods.federate.search.picture import draw
from xutrain.methods.federate.search.searched import Searched
from xutrain.methods.federate.search.space import AgentSpace


def searched(recipe: Any, method: FederatedMethod, bench: Bench, parts: list[Shard]) -> Searched:
    """``method`` under the recipe's agent.

    Raises:
        RecipeError: the method does not talk, or a client has no validation samples to report a loss of.
    """
    search = recipe.search
    if method.silent or method.pooled:
        what = f"{recipe.method.name} has no rounds that an agent could configure"
        raise RecipeError(Issue("search", what, has_value=False, hint="search: null, or another method"))
    counts = [len(p.val) for p in parts]
    agent_class = registry.load("agent", search.agent.name)
    if agent_class.learns or search.agent.name == "random":
        check_validation(recipe, parts, "the agent is rewarded by the clients' validation loss")
    space = AgentSpace(search.space, recipe.clients.count, recipe.method, [p.per_pass for p in parts])
    agent = agent_class(search.agent, space, Key(recipe.seed, "agent"))
    if search.rollouts:
        if bench.replica.num_buffer_elements or method.exchanges > 1:
            what = "needs a model without statistics beside its parameters, and a method of one exchange"
            raise RecipeError(Issue("search.rollouts", what, search.rollouts, "rollouts: 0"))
        if next(iter(bench.task.batches("val")), None) is None:
            what = "needs validation samples at the server, and there are none"
            raise RecipeError(Issue("search.rollouts", what, search.rollouts, "for example data.val_fraction=0.1"))

    def judge(model: Tensor) -> float:
        bench.point(model)
        return evaluate(bench.replica.module, bench.task, "val", bench.ctx, bench.eval_batch)["loss"]

    found = Searched(method, search, agent, counts, judge if search.rollouts else None)
    if search.rollouts and not any(found.server_side(c) for c in space.coordinates):
        what = f"the clients of {recipe.method.name} work with every searched value, so there is nothing to roll out at the server"
        raise RecipeError(Issue("search.rollouts", what, search.rollouts, "search weights, or rollouts: 0"))
    return found


def check_validation(recipe: Any, parts: list[Shard], why: str) -> None:
    """Raises RecipeError where a client keeps no samples aside."""
    empty = [k for k, p in enumerate(parts) if not len(p.val)]
    if empty:
        what = f"leaves client {empty[0]} no validation samples, and {why}"
        raise RecipeError(Issue("clients.val_fraction", what, recipe.clients.val_fraction, "for example clients.val_fraction=0.1"))


def draw_search(record: Record) -> None:
    """The policy over the rounds as a picture in the run folder."""
    draw(record.read(), record.artefact("search.png"))
