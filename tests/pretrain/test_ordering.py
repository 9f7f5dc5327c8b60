"""What the paper claims, in miniature, as far as it showed here: at one peak rate for both DSM ends below plain averaging.

With the peak rate tuned for each method, as the recipes have it, averaging ends lower: docs/pretrain.md has both tables.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

import xutrain


@pytest.mark.slow
def test_dsm_ends_below_plain_averaging(tmp_path: Path) -> None:
    """200 rounds of 6 steps, three seeds: minutes on an idle core."""
    means = {}
    for name, eta in (("dsm", {"method.eta": 1.5}), ("local_adamw", {})):
        result = xutrain.run(f"pretrain/{name}", seeds=[0, 1, 2], out=tmp_path, **{"eval.every": None, "optimizer.lr": 3e-3, **eta})
        means[name] = statistics.fmean(run["metrics"]["val_loss"] for run in result["runs"])
    assert means["dsm"] < means["local_adamw"], means
