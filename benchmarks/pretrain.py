"""Tokens per second of `xutrain pretrain` against a bare hand-written PyTorch loop with the same model, data and optimizer.

    python benchmarks/pretrain.py [--size mini] [--context 64] [--batch 8] [--steps 40] [--pairs 7] [--json FILE] [--quick]

Both loops run in this process on one thread, in turns of whole runs; seconds are of this process's CPU time between the first step
and the last, which other work on the machine disturbs least; medians of the turns, and the median of the pairs' ratios. The bare loop
is torch.optim.AdamW (its default implementation) with clipping and a cosine rate; ours is one worker of DSM (tau 12), which also
records, counts bits and takes the global step.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from results import Ratio, arguments, write

from xutrain import registry
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.loops import data_parallel
from xutrain.recipe.load import load

#: size, context, windows of a batch: the recipes' model, and one where the model is what costs
CASES = (("tiny", 32, 8), ("mini", 64, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="one model size instead of tiny and mini")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=7)
    arguments(parser)
    given = parser.parse_args()
    steps, pairs = (12, 3) if given.quick else (given.steps, given.pairs)
    torch.set_num_threads(1)
    rows, ratios = [], []
    for size, context, batch in [(given.size, given.context, given.batch)] if given.size else CASES:
        recipe = recipe_of(size, context, batch, steps)
        bare(recipe)
        ours(recipe)
        spent = [(bare(recipe), ours(recipe)) for _ in range(pairs)]
        tokens = steps * batch * context
        name = f"GPT-2 {size}, {batch} windows of {context}"
        for system, values in (("bare loop", [s[0] for s in spent]), ("xutrain", [s[1] for s in spent])):
            middle = statistics.median(values)
            rows.append({"model": name, "system": system, "tokens_per_cpu_s": round(tokens / middle), "ms_per_step": middle / steps * 1e3})
        speed = statistics.median(b / o for b, o in spent)
        ratios.append(Ratio(f"tokens per CPU second, xutrain / bare loop, {name}", speed, ">= 0.95"))
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    for ratio in ratios:
        print(f"{ratio.name}: {ratio.value:.3f}  aim {ratio.aim}, {'met' if ratio.met else 'MISSED'}")
    write(given.json, "Pre-training with local steps: one worker against a bare PyTorch loop", rows, ratios)


def recipe_of(size: str, context: int, batch: int, steps: int) -> Any:
    """One worker of DSM on the embedded text."""
    keys = [f"model.size={size}", f"data.context={context}", f"train.batch_size={batch}", "workers=1"]
    keys += [f"train.steps={steps}", "eval.every=null", "data.val_windows=1", "method.local_steps=12", "log.every=10"]
    return load("dsm", "pretrain", keys).recipe


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
