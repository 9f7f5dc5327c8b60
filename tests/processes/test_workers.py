"""Logical workers over real processes: same results for any number of processes, and honest counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xutrain.engine.context import Context


def _collectives(count: int) -> dict[str, Any]:
    ctx = Context.open(seed=3)
    workers = ctx.workers(count)
    vectors = [torch.randn(11, generator=ctx.key("v", worker=w).generator()) * 10.0**w for w in workers.hosted]
    ragged = [torch.full((w + 1,), w, dtype=torch.uint8) for w in workers.hosted]
    return {
        "mean": workers.mean(vectors),
        "gather": [t.tolist() for t in workers.gather(ragged)],
        "any": (workers.any(ctx.rank == ctx.processes - 1), workers.any(False)),
        "least": workers.least(7 - ctx.rank)[0],
        "objects": workers.objects([{"worker": w} for w in workers.hosted]),
        "server": None
        if (got := workers.gather_at_server([torch.tensor([float(w)]) for w in workers.hosted])) is None
        else [t.item() for t in got],
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_collectives_do_not_depend_on_processes(forked: Callable[..., list[Any]], processes: int) -> None:
    alone = forked(_collectives, 1, 4)[0]
    for rank, shared in enumerate(forked(_collectives, processes, 4)):
        assert torch.equal(alone["mean"], shared["mean"])
        assert shared["gather"] == [[0], [1, 1], [2, 2, 2], [3, 3, 3, 3]]
        assert shared["any"] == (True, False)
        assert shared["least"] == 7 - (processes - 1)
        assert [o["worker"] for o in shared["objects"]] == [0, 1, 2, 3]
        assert shared["server"] == ([0.0, 1.0, 2.0, 3.0] if rank == 0 else None)
