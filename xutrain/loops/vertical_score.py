"""``xutrain vertical predict``: one party's part in scoring new rows together. No torch here."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data.party_file import PartyData
from xutrain.errors import Failed, Issue, UsageError
from xutrain.loops.vertical_job import job_hash
from xutrain.loops.vertical_party import Process, Say
from xutrain.methods.vertical.losses import sigmoid, softmax
from xutrain.methods.vertical.transports.identity import Identity
from xutrain.methods.vertical.transports.wire import Refused


def write_scores(path: Path, ids: list[str], totals: np.ndarray, loss: str) -> None:
    """CSV of id and score, for the logistic loss the probability of the positive class, for softmax the class and all probabilities."""
    if totals.ndim == 2:
        shares = softmax(totals)
        head = ["id", "class", *(f"probability_{c}" for c in range(totals.shape[1]))]
        rows = [[i, str(int(z.argmax())), *(repr(float(v)) for v in p)] for i, z, p in zip(ids, totals, shares, strict=True)]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
        return
    lines = ["id,score,probability" if loss == "logistic" else "id,score"]
    for i, z in zip(ids, totals, strict=True):
        quoted = '"' + i.replace('"', '""') + '"' if any(c in i for c in ',"\n') else i
        lines.append(f"{quoted},{float(z)!r},{float(sigmoid(np.array(z)))!r}" if loss == "logistic" else f"{quoted},{float(z)!r}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Scoring(Process):
    """Joint prediction: the same greeting, the same masked sum as an evaluation; only the label holder gets the scores."""

    def __init__(self, recipe: Any, party: str, data: PartyData, identity: Identity, out: Path, say: Say, model: dict[str, Any]) -> None:
        if model.get("job") != job_hash(recipe):
            what = "was trained by another job: score with the job file and overrides of the training"
            raise UsageError(Issue("--model", what, model.get("job"), has_value=False))
        super().__init__(recipe, party, data, identity, out, say, purpose="predict")
        self.port.facts["model"] = f"{model.get('run')} {model.get('rows')}"
        weights, known = np.array(model["weights"], dtype=np.float64), self.seat.method.weights
        if weights.shape != known.shape:
            self.link.close(0)
            raise UsageError(Issue("--model", f"its weights have another shape than {known.shape}", weights.shape))
        self.seat.method.load_state({"weights": weights})

    def run(self) -> dict[str, float]:
        """Greet, sum once, write ``scores.csv`` at the leader."""
        self.link.start()
        try:
            self._greet_all()
            if self.seat.party == self.plan.leader:
                self.port.evaluate("test")
                self._events(lambda: "test" in self.arrived)
                for p in self.port.peers:
                    self._tell_done(p)
            else:
                self._events(lambda: self._over)
        except Refused as reason:
            raise Failed(Issue(self.party, str(reason), has_value=False)) from None
        finally:
            self.link.close()
        self.port.ledger.write(self.out / f"ledger.predict.{self.party}.jsonl", self.seat.party, self.plan.names)
        return {"rows": float(len(self.data.test_ids))}

    @property
    def _over(self) -> bool:
        return self.plan.names[self.plan.leader] in self.port.finished

    def _evaluated(self, split: str, summed: np.ndarray) -> None:
        write_scores(self.out / "scores.csv", self.data.test_ids, self._totals(summed), self.recipe.loss)
        self.arrived.add(split)

    def _save(self, done: bool = False) -> None:
        self.saved_at = float("inf")

    def _leave(self, scores: dict[str, float]) -> None:
        pass
