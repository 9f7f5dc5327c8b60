"""Whether `--dry-run --bandwidth` is right: predicted step times of data-parallel recipes beside measured ones, 2 and 4 ranks.

    python benchmarks/prediction.py [--links 1gbit 100mbit] [--ranks 2 4] [--steps 12] [--json FILE]

The recipes are `quantize/orq` and `sparsify/def` on embedded digits with an MLP of 1.1 M parameters, with the codecs below. Each rank
is a process in a network namespace (laboratory.py) and takes real steps of the recipe's loop: gradient, exchange, update; the
median is measured. Then all ranks at once ask `foresee.step_time` for the same recipe, the link's rate and the latency of the
smallest all-reduce there: at once, since ranks that share cores slow each other, which is no fault of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import laboratory
from results import Ratio, arguments, write

COMMON = ["model.hidden=[1024,1024]", "train.batch_size=16"]
#: label -> (recipe, overrides)
RECIPES: dict[str, tuple[str, list[str]]] = {
    "fp, ring": ("quantize/orq", ["codec=fp", "exchange.reduction=ring"]),
    "ORQ-3, all-gather": ("quantize/orq", ["codec={name: orq, levels: 3}"]),
    "ORQ-3, all-to-all": ("quantize/orq", ["codec={name: orq, levels: 3}", "exchange.mode=alltoall"]),
    "BinGrad-b, all-gather": ("quantize/orq", ["codec=bingrad_b"]),
    "DEF, ratio 64, ring": ("sparsify/def", ["codec={name: random_block, ratio: 64}", "exchange.reduction=ring"]),
}


def rank_main(steps: int, rate: float) -> None:
    """In one rank: steps of every recipe, measured and foreseen; rank 0 prints them."""
    import torch
    import torch.distributed as dist

    from xutrain.engine.context import Context
    from xutrain.engine.network import Link
    from xutrain.launch.foresee import step_time
    from xutrain.loops import data_parallel
    from xutrain.methods.codecs import fast
    from xutrain.recipe.load import load

    rank, world = laboratory.join()
    fast.load()
    small, pings = torch.zeros(1), []
    for _ in range(30):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(small)
        pings.append(time.perf_counter() - start)
    link = Link(rate, statistics.median(pings[5:]) / (2 * (world - 1)))
    found: dict[str, Any] = {}
    for label, (name, overrides) in RECIPES.items():
        recipe = load(name, None, [*COMMON, *overrides, f"workers={world}"]).recipe
        ctx = Context(0, rank, world)
        job = data_parallel.build(recipe, ctx)
        times = []
        for step in range(steps + 2):
            dist.barrier()
            start = time.perf_counter()
            _, grad = data_parallel.gradient(recipe, ctx, job, 0, rank, step)
            job.method.step([grad], 0.01, step)
            times.append(time.perf_counter() - start)
        dist.barrier()
        foreseen = step_time(recipe, link)
        found[label] = {"measured": statistics.median(times[2:]), **foreseen}
    if rank == 0:
        print(json.dumps(found))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=[n for n, r in laboratory.RATES.items() if r], default=["1gbit", "100mbit"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=float, metavar="RATE", help=argparse.SUPPRESS)
    arguments(parser)
    given = parser.parse_args()
    if given.rank:
        rank_main(given.steps, given.rank)
    if given.quick:
        given.links, given.ranks, given.steps = ["100mbit"], [2], 3
    reason = laboratory.missing()
    rows: list[dict[str, Any]] = []
    if reason:
        note = f"Not measured: limited links cannot be made here ({reason})."
        print(note)
        write(given.json, "Predicted step times", rows, [Ratio("measured against predicted", None, "<= 1.3", reason)], notes=[note])
        return
    factors = []
    for ranks in given.ranks:
        for link in given.links:
            with laboratory.Laboratory(ranks, link) as lab:
                answer = lab.run([sys.executable, __file__, "--rank", str(laboratory.bandwidth(link)), "--steps", str(given.steps)])
            for label, got in answer.items():
                factor = got["measured"] / got["step_s"]
                factors.append(max(factor, 1 / factor))
                row = {"table": f"{link}, {ranks} ranks", "recipe": label, "measured ms": 1e3 * got["measured"]}
                row |= {"predicted ms": 1e3 * got["step_s"], "measured / predicted": factor, "gradient ms": 1e3 * got["gradient_s"]}
                rows.append({**row, "codec ms": 1e3 * got["codec_s"], "wire ms": 1e3 * got["wire_s"]})
                times = f"measured {row['measured ms']:8.2f} ms, predicted {row['predicted ms']:8.2f} ms"
                print(f"{row['table']:18}{label:24}{times}, factor {factor:.2f}", flush=True)
    middle = statistics.median(factors)
    why = "ranks share two cores, and transfers take processor time that the model does not count" if middle > 1.3 else ""
    ratios = [Ratio("measured against predicted step time, median factor", middle, "<= 1.3", why)]
    ratios.append(Ratio("measured against predicted step time, largest factor", max(factors)))
    write(given.json, "Predicted step times", rows, ratios)


if __name__ == "__main__":
    main()
