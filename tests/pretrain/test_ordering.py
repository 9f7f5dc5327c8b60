"""What the paper claims, in miniature, as far as it showed here: at equal communication DSM ends below plain averaging."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

import xutrain


@pytest.mark.slow
def test_dsm_ends_below_plain_averaging(tmp_path: Path) -> None:
    """200 rounds of 6 steps, three seeds: minutes on an idle core. docs/pretrain.md has the numbers, SlowMo's too."""
    means = {}
    for name in ("dsm", "local_adamw"):
        result = xutrain.run(f"pretrain/{name}", seeds=[0, 1, 2], out=tmp_path, **{"eval.every": None})
        means[name] = statistics.fmean(run["metrics"]["val_loss"] for run in result["runs"])
    assert means["dsm"] < means["local_adamw"], means
