"""FedSM: a global model, a personalised model per client, and a selector that says which of them shall segment an image.

Paper: arXiv 2203.10144; rules as in its authors' code (NVFlare research/fed-sm). Per round, client k receives w_g, its w_k, the
selector phi and, after round 0, the averaged Adam moments, and does in this order
  1. scores of what it received on its own validation samples: w_g, w_k, recall of phi (from round 1 on)
  2. P local steps of w_g and, on the same minibatches, P of w_k; each with an optimizer of its own that lives on the client
  3. E_s times: one Adam step of phi on the gradient summed over all its minibatches, cross-entropy to the label k
and the server, with a_k = P_k / sum P_j (so that a_k is the share of minibatches, S_k / sum S_j),

    4. w_g <- w_g + sum a_k Delta_k w_g;   phi <- phi + sum a_k Delta_k phi;   moments <- sum a_k moments_k
    5. w_k <- lambda w_k + (1 - lambda)/(K - 1) sum over j != k of w_j, all at once      (``softpull.py``)
    on an image x:   p = softmax(phi(x)), k* = argmax p;   w_{k*} where p_{k*} > gamma (strict), else w_g

5 has no data-size weights. The server also keeps (6) the best w_g and phi by the mean score weighted by P_k, and each client's best
w_k (from round 1 on; ``model_selection.py``). Volumes: p is the mean over the axial slices. ``gamma_quantile`` (ours) gives every client
a gamma of its own, from what phi says of its validation samples: one more number with the scores of step 1, and that of k* counts.

``selector_optimizer``: averaged_moments is the paper's; none leaves every client its own moments (each sees one label, so the
selector hardly learns); server_adam (ours) sends the gradient only and runs Adam at the server: exactly centralised training
of the selector with one step a round, a third of its uplink, nothing but phi down.
``mode: extra`` (FedSM-extra): FedAvg first, one round in which every client fine-tunes w_g, then ``selector_rounds`` rounds in
which only the selector learns; all of them are part of ``train.rounds``.

Limits: gamma 1 is always w_g, gamma 0 always w_{k*}; lambda 1/K, equal P_k and no client absent keep every w_k at w_g, which is then
FedAvg's (equal weights); one client is local training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import Committee, Network, Networked, Plan, Problem, Reply, Round, State, Traffic
from xutrain.methods.federate.local_steps import adam, descend, memory_of
from xutrain.methods.federate.model_selection import Voting
from xutrain.methods.federate.softpull import PullOptions
from xutrain.registry import method

Phase = Literal["together", "average", "finetune", "select"]


@method(
    "federate", "fedsm", paper="2203.10144", summary="global and personalised models with SoftPull, and a selector that chooses among them"
)
class FedSM(Voting):
    class Options(PullOptions):
        name: Literal["fedsm"] = "fedsm"
        gamma: float = Field(
            0.9, ge=0, le=1, description="The selector is followed above this probability (strict); 1: always the global model."
        )
        gamma_quantile: float | None = Field(
            None, ge=0, le=1, description="Ours: a client's own gamma, this quantile of p_k on its validation samples; null: gamma for all."
        )
        selector: Literal["vgg11", "small"] = Field("vgg11", description="vgg11: the paper's, 129 M numbers; small: 0.1 M (ours).")
        selector_optimizer: Literal["averaged_moments", "none", "server_adam"] = Field(
            "averaged_moments",
            description="What keeps the selector's Adam together: averaged moments, nothing, or Adam at the server (ours).",
        )
        selector_lr: float = Field(1e-3, gt=0, le=10, description="Learning rate of the selector's Adam; the schedule leaves it alone.")
        selector_epochs: int = Field(
            1, ge=1, le=10**5, description="E_s: selector steps of a round, each on the client's whole training set."
        )
        slices: int = Field(12, ge=1, description="Axial slices of a volume that a selector step looks at.")
        inference: Literal["super", "oracle", "ensemble", "shared", "own"] = Field(
            "super", description="super: the paper's rule; oracle: the true site's model; ensemble: all w_k; shared: w_g; own: as oracle."
        )
        select: bool = Field(True, description="Keep the best models over the rounds, where clients have validation samples.")
        mode: Literal["joint", "extra"] = Field(
            "joint", description="joint: FedSM; extra: FedAvg, then fine-tuning, then the selector alone."
        )
        finetune_epochs: int = Field(5, ge=1, description="mode extra: fine-tuning, in multiples of a round's local steps.")
        selector_rounds: int = Field(10, ge=1, description="mode extra: last rounds, in which only the selector learns.")

    @classmethod
    def networks(cls, options: Any, clients: int) -> dict[str, Network]:
        return {"selector": Network(options.selector, clients, options.slices)}

    def phase(self, index: int) -> Phase:
        """What is learnt in round ``index``."""
        if self.options.mode == "joint":
            return "together"
        left = self.federation.rounds - index
        return "select" if left <= self.options.selector_rounds else "finetune" if left == self.options.selector_rounds + 1 else "average"

    def notes(self) -> list[str]:
        remarks = super().notes() if self.options.mode == "joint" else []
        if self.options.gamma_quantile is not None and not self.asks(1):
            remarks.append("gamma_quantile has no effect where nothing is scored (select=false, mode=extra): gamma counts")
        if self.options.mode == "extra" and self.phase(0) != "average":
            remarks.append(
                f"mode extra has no round of averaging: {self.federation.rounds} rounds, {self.options.selector_rounds} of the selector"
            )
        return remarks

    def server_state(self, model: Tensor) -> State:
        phi = self.federation.networks["selector"]
        state: State = {
            "model": model.clone(),
            "personal": [model.clone() for _ in range(self.federation.clients)],
            "selector": phi.clone(),
            "best": {},
        }
        if self.options.selector_optimizer == "server_adam":
            state["adam"] = {}
        return state

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        parts = self.traffic_in(round, 0).down
        sent = {"model": server["model"], "personal": server["personal"][client], "selector": server["selector"]}
        plan.tensors = {name: tensor for name, tensor in sent.items() if name in parts}
        if "moments" in server and "moments" in parts:
            plan.tensors["moments"] = server["moments"]
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        phase, got = self.phase(plan.round), plan.tensors
        numbers = self.votes(plan, problem)
        reply = Reply(numbers=numbers)
        if phase in ("together", "average"):
            end = descend(problem, got["model"], plan, memory_of(self.federation, state, "model"))
            reply.tensors["model"] = end.sub_(got["model"])
        if phase == "together":
            reply.tensors["personal"] = descend(problem, got["personal"], plan, memory_of(self.federation, state, "personal"))
        if phase == "finetune":
            steps = plan.steps * self.options.finetune_epochs
            reply.tensors["personal"] = descend(problem, got["model"], plan, memory_of(self.federation, state, "personal"), steps=steps)
        if phase in ("together", "select"):
            self._learn_selector(state, plan, problem, reply)
        return reply

    def _learn_selector(self, state: State, plan: Plan, problem: Problem, reply: Reply) -> None:
        """Step 3: the sum over minibatches of their mean gradients is S_k times the mean over the samples."""
        assert isinstance(problem, Networked)
        own, phi = problem.of("selector"), plan.tensors["selector"]
        if self.options.selector_optimizer == "server_adam":
            reply.tensors["selector"] = own.full_gradient(phi)
            return
        averaged = self.options.selector_optimizer == "averaged_moments"
        memory: State = {} if averaged else state.setdefault("selector", {})
        if "moments" in plan.tensors:
            first, second = plan.tensors["moments"].chunk(2)
            taken = (plan.round - self._first_selector_round()) * self.options.selector_epochs  # as old as the moments, wherever I was
            memory.update(first=first.clone(), second=second.clone(), count=taken)
        y, lr = phi.clone(), self.value(plan, "selector_lr")
        for _ in range(self.options.selector_epochs):
            y.add_(adam(own.full_gradient(y).mul_(max(plan.steps, 1)), memory), alpha=-lr)
        reply.tensors["selector"] = y.sub_(phi)
        if averaged:
            reply.tensors["moments"] = torch.cat([memory["first"], memory["second"]])

    def _first_selector_round(self) -> int:
        return 0 if self.options.mode == "joint" else max(0, self.federation.rounds - self.options.selector_rounds)

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        total = sum(round.steps)
        mean: dict[str, Tensor] = {}
        models: dict[int, Tensor] = {}
        votes: dict[int, dict[str, float]] = {}
        for reply in replies:
            share = round.steps[round.place(reply.client)] / total
            for name, tensor in reply.tensors.items():
                if name == "personal":
                    models[reply.client] = tensor
                    continue
                mean.setdefault(name, torch.zeros_like(tensor)).add_(tensor, alpha=share)
            votes[reply.client] = dict(reply.numbers)
        if self.asks(round.index):
            self.keep_best(server, votes)
        if "model" in mean:
            server["model"].add_(mean["model"])
        if "moments" in mean:
            server["moments"] = mean["moments"]
        if "selector" in mean and "adam" in server:
            server["selector"].add_(adam(mean["selector"], server["adam"]), alpha=-self.value(round, "selector_lr"))
        elif "selector" in mean:
            server["selector"].add_(mean["selector"])
        for client, model in models.items():
            server["personal"][client] = model
        if self.phase(round.index) == "together":
            self.pull(server, round)

    def committee(self, server: State) -> Committee:
        best = server["best"]
        held = best.get("personal", {})
        own = tuple(held.get(str(k), model) for k, model in enumerate(server["personal"]))
        shared, phi = best.get("model", server["model"]), best.get("selector", server["selector"])
        gamma: float | tuple[float, ...] = self.options.gamma
        if "gammas" in best:
            gamma = tuple(best["gammas"].get(str(k), self.options.gamma) for k in range(len(own)))
        return Committee(shared, own, self.options.inference, phi, gamma)

    def traffic_in(self, round: Round, numel: int, previous_lr: float | None = None) -> Traffic:
        phi, phase, kind = self.federation.networks["selector"].numel(), self.phase(round.index), self.options.selector_optimizer
        down = {"together": ("model", "personal"), "average": ("model",), "finetune": ("model",), "select": ()}[phase]
        up = {"together": ("model", "personal"), "average": ("model",), "finetune": ("personal",), "select": ()}[phase]
        traffic = Traffic(dict.fromkeys(down, numel), dict.fromkeys(up, numel))
        if phase in ("together", "select"):
            traffic.down["selector"] = traffic.up["selector"] = phi
            if kind == "averaged_moments":
                traffic.up["moments"] = 2 * phi
                if round.index > self._first_selector_round():
                    traffic.down["moments"] = 2 * phi
        if self.asks(round.index):
            traffic.answers.update(dict.fromkeys(self.answers(), 1))
        return traffic
