"""Every way to average a vector, on links of several bandwidths: measured, and as the alpha-beta model foresees it.

    python benchmarks/links.py [--links loopback 1gbit 100mbit] [--ranks 2 4] [--elements 1000000] [--rounds 5] [--json FILE]

One process per worker, each in a network namespace of its own (laboratory.py). Medians of the whole exchange (encode, send,
decode) over the rounds. "bytes" is what a rank's card received per exchange, headers and acknowledgements included, beside what
the bit meter counts. The model: the processor's part, measured in the same processes without sending, plus
xutrain.engine.network.Link with the link's rate and the latency of the smallest all-reduce there. Where limited links cannot
be made, the model alone is printed and labelled so. "10gbit" is beyond what two cores can push through namespaces.
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

#: label -> (codec, options, mode, reduction)
WAYS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "fp32 all-reduce": ("fp", {}, "allgather", "ring"),
    "orq-3 all-gather": ("orq", {"levels": 3}, "allgather", "exact"),
    "orq-3 all-to-all": ("orq", {"levels": 3}, "alltoall", "exact"),
    "orq-9 all-gather": ("orq", {"levels": 9}, "allgather", "exact"),
    "bingrad-b all-gather": ("bingrad_b", {}, "allgather", "exact"),
    "orq-9 server": ("orq", {"levels": 9}, "ps", "exact"),
    "block-64 all-reduce": ("random_block", {"ratio": 64}, "allgather", "ring"),
}


def rank_main(elements: int, rounds: int) -> None:
    """In one rank: time every way; rank 0 prints the result."""
    import torch
    import torch.distributed as dist

    import xutrain
    from xutrain.engine.meter import BitMeter
    from xutrain.engine.workers import Workers
    from xutrain.methods.codecs import fast
    from xutrain.methods.exchange import Exchange

    rank, world = laboratory.join()
    fast.load()
    vector = torch.randn(elements, generator=torch.Generator().manual_seed(rank))
    small = torch.zeros(1)
    pings = []
    for _ in range(30):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(small)
        pings.append(time.perf_counter() - start)
    found: dict[str, Any] = {"latency": statistics.median(pings[5:]) / (2 * (world - 1)), "ways": {}}
    for label, (name, options, mode, reduction) in WAYS.items():
        workers = Workers(world, rank, world, reduction)  # type: ignore[arg-type]
        alone = Workers(world, 0, 1, reduction)  # type: ignore[arg-type]
        meter = BitMeter()
        codec = xutrain.codec(name, workers=world, **options)
        exchange = Exchange(workers, codec, meter, mode)  # type: ignore[arg-type]
        times, processor, received = [], [], []
        for i in range(rounds + 1):
            dist.barrier()
            before, start = laboratory.counters()[0], time.perf_counter()
            exchange.mean([vector], xutrain.key(step=i))
            times.append(time.perf_counter() - start)
            dist.barrier()
            received.append(laboratory.counters()[0] - before)
        for i in range(rounds + 1):
            dist.barrier()
            start = time.perf_counter()
            computed(exchange, alone, vector, xutrain.key(step=i))
            processor.append(time.perf_counter() - start)
        found["ways"][label] = {
            "seconds": statistics.median(times[1:]),
            "processor": statistics.median(processor[1:]),
            "received": statistics.median(received[1:]),
            "counted": meter.down / 8 / world / (rounds + 1),
        }
    if rank == 0:
        print(json.dumps(found))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def computed(exchange: Any, alone: Any, vector: Any, key: Any) -> None:
    """What one worker computes in an exchange, without sending: its own messages stand for all of them."""
    codec, count = exchange.codec, alone.count
    if codec.dense:
        vector.clone().div_(count)
    elif codec.shared_support:
        payload = codec.encode(vector, key)
        codec.decode(payload)
    elif exchange.mode == "alltoall":
        parts = [codec.encode(vector[a:b], key) for a, b in exchange.shards(vector.numel())]
        mean = sum(codec.decode(parts[0]) for _ in range(count)) / count
        codec.encode(mean, key)
        for part in parts:
            codec.decode(part)
    else:
        payload = codec.encode(vector, key)
        total = codec.decode(payload)
        for _ in range(count - 1):
            total.add_(codec.decode(payload))
        total.div_(count)


def rows_of(link: str, ranks: int, elements: int, answer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row for every way: measured where there is an answer, modelled in any case."""
    import xutrain
    from xutrain.engine.meter import BitMeter
    from xutrain.engine.network import Link
    from xutrain.engine.workers import Workers
    from xutrain.methods.exchange import Exchange

    rate = laboratory.bandwidth(link)
    if rate is None:  # loopback: the rate that explains the full-precision all-reduce, so that row says nothing
        seconds = answer["ways"]["fp32 all-reduce"]["seconds"] if answer else 0.02
        rate = 2 * (ranks - 1) / ranks * 32 * elements / seconds
    place = Link(rate, answer["latency"] if answer else 1e-4)
    rows = []
    for label, (name, options, mode, reduction) in WAYS.items():
        exchange = Exchange(Workers(ranks, 0, 1, reduction), xutrain.codec(name, workers=ranks, **options), BitMeter(), mode)  # type: ignore[arg-type]
        wire = exchange.seconds(elements, place)
        got = answer["ways"][label] if answer else {}
        row: dict[str, Any] = {"table": f"{link}, {ranks} ranks", "way": label, "measured s": got.get("seconds")}
        modelled = wire + got.get("processor", 0.0)
        row |= {"modelled s": modelled, "wire s (model)": wire, "processor s": got.get("processor")}
        row |= {"MB received (card)": got["received"] / 1e6 if got.get("received") else None}
        row |= {"MB received (meter)": exchange.bits(elements)[1] / ranks / 8e6}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=list(laboratory.RATES), default=["loopback", "10gbit", "1gbit", "100mbit"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments(parser)
    given = parser.parse_args()
    if given.rank:
        rank_main(given.elements, given.rounds)
    if given.quick:
        given.links, given.ranks, given.elements, given.rounds = ["loopback", "1gbit"], [2], 200_000, 2
    reason = laboratory.missing()
    rows: list[dict[str, Any]] = []
    ratios, notes = [], [f"{given.elements:,} float32 elements, medians of {given.rounds}."]
    for ranks in given.ranks:
        for link in given.links:
            command = [sys.executable, __file__, "--rank", "--elements", str(given.elements), "--rounds", str(given.rounds)]
            if laboratory.RATES[link] and reason:
                notes.append(f"{link}: modelled only ({reason}); processor time left out.")
                rows += rows_of(link, ranks, given.elements, None)
                continue
            with laboratory.Laboratory(ranks, link) as lab:
                rows += rows_of(link, ranks, given.elements, lab.run(command))
    for link in ("1gbit", "100mbit"):
        off = [r["measured s"] / r["modelled s"] for r in rows if r["table"].startswith(link) and r["measured s"]]
        if off:
            value = statistics.median(max(x, 1 / x) for x in off)
            why = "two cores serve all ranks, so processor time and transfers compete where the model adds them" if value > 1.3 else ""
            ratios.append(Ratio(f"measured against modelled time at {link}, median factor", round(value, 3), "<= 1.3", why))
    for row in rows:
        measured = f"{row['measured s']:9.4f}" if row["measured s"] else f"{'-':>9}"
        card = f"{row['MB received (card)']:9.3f}" if row["MB received (card)"] else f"{'-':>9}"
        told = f"model {row['modelled s']:8.4f} s, card {card} MB, meter {row['MB received (meter)']:8.3f} MB"
        print(f"{row['table']:18}{row['way']:22}{measured} s, {told}")
    for ratio in ratios:
        print(f"{ratio.name}: {ratio.value} ({ratio.aim})")
    write(given.json, "Links: every way to average, measured and modelled", rows, ratios, notes=notes)


if __name__ == "__main__":
    main()
