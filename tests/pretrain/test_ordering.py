"""What the paper claims, in miniature: at equal communication DSM ends below SlowMo, with horizons scaled to the rounds."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

import xutrain


@pytest.mark.slow
def test_dsm_ends_below_slowmo_and_plain_averaging(tmp_path: Path) -> None:
    """200 rounds of 6 steps, three seeds: minutes on an idle core."""
    means = {}
    for name in ("dsm", "slowmo", "local_adamw"):
        result = xutrain.run(f"pretrain/{name}", seeds=[0, 1, 2], out=tmp_path, **{"eval.every": None})
        means[name] = statistics.fmean(run["metrics"]["val_loss"] for run in result["runs"])
    assert means["dsm"] < means["slowmo"] < means["local_adamw"], means
