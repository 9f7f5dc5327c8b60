"""L2GD: loopless descent on (1/K) sum F_k(w_k) + (strength/2K) sum ||w_k - mean||^2.

Hanzely and Richtarik, 2020 (arXiv 2002.05516), called L2SGD with minibatches. Every iteration is, by one common coin,

    with probability 1 - q:   w_k <- w_k - eta g_k(w_k) for every k,   eta = s / (K (1 - q))
    with probability q:       w_k <- (1 - c) w_k + c mean,   c = s strength / (K q) = eta (1 - q) strength / q

Nothing is sent before a pull, so a round here is the gradient steps between two pulls (their number is drawn, 0 too) and the pull.
Its mean is (1 - q)/q; ``pull_chance`` null takes q = 1/(P + 1), P local steps on average. SoftPull is the deterministic
sibling, with c = 1 - rho. The mean counts every client once.

Limits: strength 0 is local training; c = 1 is FedAvg with equal weights; a c above 1 is refused, one of a drawn eta (a search) is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.methods.federate.base import FederatedMethod, Plan, Problem, Reply, Round, State, Traffic
from xutrain.methods.federate.local_steps import descend, memory_of
from xutrain.registry import Named, method


@method(
    "federate",
    "l2gd",
    paper="2002.05516",
    summary="own models, pulled to their mean at random times (SoftPull's random sibling)",
    aliases=("l2sgd",),
)
class L2GD(FederatedMethod):
    personal = True
    adaptive = True
    plain = True

    class Options(Named):
        name: Literal["l2gd"] = "l2gd"
        strength: float = Field(1.0, ge=0, description="Weight of the distance to the mean (lambda of the paper).")
        pull_chance: float | None = Field(None, gt=0, lt=1, description="Chance q of a pull in an iteration; null: 1/(P + 1).")

    options: Any

    def chance(self, steps: float) -> float:
        """q."""
        return float(self.options.pull_chance or 1 / (steps + 1))

    def pull(self, lr: float, q: float) -> float:
        """c."""
        return float(lr * (1 - q) * self.options.strength / q)

    def sound_pull(self, lr: float, q: float) -> float:
        """c; refuses one above 1, which overshoots the mean."""
        c = self.pull(lr, q)
        if c > 1:
            most = q / (lr * (1 - q))
            raise RecipeError(
                Issue("method.strength", f"pulls past the mean (c = {c:.3g})", self.options.strength, f"at most {most:.3g} with this lr")
            )
        return c

    def server_state(self, model: Tensor) -> State:
        return {"model": model.clone(), "pull": 0.0, "chance": 0.5}

    def configure(self, server: State, round: Round) -> Round:
        """Draws how many gradient steps come before the next pull; the same for all clients."""
        server["chance"] = q = self.chance(round.mean_steps)
        server["pull"] = self.sound_pull(round.lr, q)
        u = float(Key(self.federation.seed, "l2gd", round.index).uniform(1)[0])
        drawn = int(math.log(max(1 - u, 1e-12)) / math.log(1 - q))
        return replace(round, steps=(drawn,) * len(round.steps))

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        start = self.pulled(state, plan.tensors["model"])
        state["own"] = descend(problem, start, plan, memory_of(self.federation, state, "model"))
        state["pull"] = plan.knobs["pull"]  # of this round's eta, whenever its mean arrives
        return Reply({"model": state["own"]})

    def pulled(self, state: State, mean: Tensor) -> Tensor:
        """The pull that ended the last round, done when its mean has arrived."""
        if "own" not in state:
            return mean
        own: Tensor = state["own"]
        return own + (mean - own) * state["pull"]

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        plan.knobs["pull"] = min(1.0, self.pull(round.lr, server["chance"]))  # an agent may have drawn another eta since ``configure``
        return plan

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        """The mean of the objective counts every client once, whatever ``clients.weights`` says."""
        total = torch.zeros_like(server["model"])
        for reply in replies:
            total.add_(reply.tensors["model"])
        server["model"] = total.div_(len(round.clients))

    def served(self, server: State, state: State) -> Tensor:
        return self.pulled(state, server["model"])

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        return Traffic(down={"model": numel}, up={"model": numel})
