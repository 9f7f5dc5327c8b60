"""At equal updates staleness costs training loss: back-propagation below the longest queue, at a high rate, three seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.conftest import make, watch


@pytest.mark.slow
def test_longest_queue_pays_at_equal_updates(tmp_path: Path) -> None:
    means = {}
    for name, method in (("bp", "bp"), ("longest", {"name": "dsp", "p": [3, 3, 0], "m": [10, 5, 0]})):
        losses = []
        for seed in range(3):
            chosen = make(method, train__steps=300, data__subset="null", seed=seed, optimizer__lr=0.1, model__norm="true", model__depth=6)
            losses.append(watch(chosen, tmp_path).metrics["train_loss"])  # type: ignore[attr-defined]
        means[name] = sum(losses) / 3
    assert means["bp"] < means["longest"], means
