"""Tokens per second of `xutrain pretrain` against a bare hand-written PyTorch loop with the same model, data and optimizer.

    OMP_NUM_THREADS=1 python benchmarks/pretrain.py [--size mini] [--context 64] [--batch 8] [--steps 60] [--repeats 5]

Both loops run in this process, in turns; seconds are of this process's CPU time, which other work on the machine disturbs least, and
the best turn of each counts. Prints one JSON document. The bare loop is torch.optim.AdamW with clipping and a cosine rate; ours is one
worker of DSM (tau 12), which also records, counts bits and takes the global step.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from xutrain import registry
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.loops import data_parallel
from xutrain.recipe.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    keys = [f"model.size={given.size}", f"data.context={given.context}", f"train.batch_size={given.batch}", "workers=1"]
    keys += [f"train.steps={given.steps}", "eval.every=null", "data.val_windows=1", "method.local_steps=12", "log.every=10"]
    recipe = load("dsm", "pretrain", keys).recipe
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {"xutrain": [], "bare": []}
    for _ in range(given.repeats):
        spent["bare"].append(bare(recipe))
        spent["xutrain"].append(ours(recipe))
    tokens = given.steps * given.batch * given.context
    speed = {name: tokens / min(values) for name, values in spent.items()}
    ratio = speed["xutrain"] / speed["bare"]
    print(json.dumps({"tokens_per_cpu_s": speed, "ratio": ratio, "cpu_seconds": spent, "settings": vars(given)}, indent=1))


def ours(recipe: Any) -> float:
    """Seconds between the first step and the end of training; building, the last evaluation and its checkpoint are not counted."""
    moments: list[float] = []

    class Timed(Record):
        def progress(self, step: int, total: int, unit: str = "step", **shown: float) -> None:
            moments.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(recipe.seed)
        build = data_parallel.build

        def built(*args: Any) -> Any:
            job = build(*args)
            moments.append(time.process_time())
            return job

        data_parallel.build = built  # type: ignore[assignment]
        try:
            data_parallel.run(recipe, ctx, Timed(Path(folder), ctx.meter))
        finally:
            data_parallel.build = build
    return moments[-1] - moments[0]


def bare(recipe: Any) -> float:
    """The same training as one would write it by hand, for one worker without a global step."""
    task = registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    torch.manual_seed(0)
    module = registry.load("model", recipe.model.name).build(recipe.model, task)
    parameters = [p for p in module.parameters() if p.requires_grad]
    o, steps, warmup = recipe.optimizer, recipe.train.steps, recipe.schedule.warmup_steps
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay}]
    groups += [{"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.moments)
    began = time.process_time()
    for step in range(steps):
        done = (step - warmup) / max(1, steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = o.lr * factor
        batch = task.draw(step, 0, 1, recipe.train.batch_size, 0)
        optimizer.zero_grad()
        loss = task.loss(module(batch.inputs), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip_norm)
        optimizer.step()
    return time.process_time() - began


if __name__ == "__main__":
    main()
