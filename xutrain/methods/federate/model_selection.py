"""Model selection over the rounds, steps 1 and 6 of ``fedsm.py`` (arXiv 2203.10144): clients score what they received, the best is kept.

Scores are the clients' own, on their own validation samples: w_g by Dice (or accuracy), w_k likewise, phi by the recall of the
client's label. The server keeps the w_g and the phi of the best round by the mean weighted by P_k, and each client's best w_k.
Limit: without validation samples, or with ``select`` off, the models of the last round are served.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xutrain.methods.federate.base import Confident, Networked, Plan, Problem, State
from xutrain.methods.federate.softpull import Pulling

VOTES = ("votes", "score_model", "score_personal", "score_selector")


class Voting(Pulling):
    """What FedSM asks of its clients besides training. Options: ``select``, ``mode`` and ``gamma_quantile``."""

    def asks(self, index: int) -> bool:
        """Whether the models that clients receive in round ``index`` are scored."""
        return bool(self.options.select) and self.options.mode == "joint" and index > 0

    def answers(self) -> tuple[str, ...]:
        """The numbers that a client sends with its scores."""
        return VOTES if self.options.gamma_quantile is None else (*VOTES, "gamma")

    def votes(self, plan: Plan, problem: Problem) -> dict[str, float]:
        """Step 1. A client without validation samples votes with weight 0."""
        if not self.asks(plan.round):
            return {}
        scores = dict.fromkeys(self.answers(), 0.0)
        found = _score(problem.evaluate(plan.tensors["model"]))
        if found is not None:
            assert isinstance(problem, Networked)
            scores.update(votes=float(plan.steps), score_model=found)
            scores["score_personal"] = _score(problem.evaluate(plan.tensors["personal"])) or 0.0
            selector = problem.of("selector")
            scores["score_selector"] = _score(selector.evaluate(plan.tensors["selector"])) or 0.0
            if self.options.gamma_quantile is not None:
                assert isinstance(selector, Confident)
                scores["gamma"] = float(selector.confidence(plan.tensors["selector"]).quantile(self.options.gamma_quantile))
        return scores

    def keep_best(self, server: State, votes: dict[int, dict[str, float]]) -> None:
        """Step 6, for the models that the clients just scored: the server's, before it takes in what they learnt."""
        best: dict[str, Any] = server["best"]
        weight = sum(v["votes"] for v in votes.values())
        for name in ("model", "selector") if weight else ():
            score = sum(v["votes"] * v[f"score_{name}"] for v in votes.values()) / weight
            if score > best.get(f"score_{name}", -1.0):
                best[name], best[f"score_{name}"] = server[name].clone(), score
                if name == "selector" and self.options.gamma_quantile is not None:
                    best["gammas"] = {str(client): v["gamma"] for client, v in votes.items() if v["votes"]}
        held = best.setdefault("personal", {})
        for client, v in votes.items():
            if v["votes"] and v["score_personal"] > held.get(f"score_{client}", -1.0):
                held[str(client)], held[f"score_{client}"] = server["personal"][client].clone(), v["score_personal"]

    def served(self, server: State, state: State) -> Tensor:
        model: Tensor = server["best"].get("model", server["model"])
        return model


def _score(metrics: dict[str, float]) -> float | None:
    """Dice, or accuracy where there is none; None without samples."""
    found = metrics.get("dice", metrics.get("accuracy"))
    return None if found is None or found != found else found
