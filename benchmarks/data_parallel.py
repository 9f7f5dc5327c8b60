"""One training step of an 11 M-parameter network: BinGrad-b, ORQ-3 and DEF against DDP in fp32, fp16 and with PowerSGD.

    python benchmarks/data_parallel.py [--links loopback 1gbit 100mbit] [--ranks 2] [--rounds 5] [--json FILE]

Loopback needs nothing. Limited links are network namespaces with token buckets (laboratory.py); they need root, ip and tc, and
are left out with a word where those are missing. All variants live in the same processes and take turns, so that a busy
machine slows them alike. Medians; "sent" is what the card counted per step and rank; "cpu s" is what a rank computed.
The crossover is the bandwidth below which a variant is ahead of fp32: its extra time on loopback is what it must save in bits,
B = (bits of fp32 - bits of the variant) / (its loopback time - fp32's). Modelled speed-ups are loopback times plus bits / B.
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

WARM_UP, BATCH = 3, 16
VARIANTS = ["fp32", "fp16", "powersgd-1", "bingrad-b", "orq-3", "def-64", "noop"]
HOOKED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bingrad-b": ("bingrad_b", {}, {"error_feedback": False}),
    "orq-3": ("orq", {"levels": 3}, {"error_feedback": False}),
    "def-64": ("random_block", {"ratio": 64}, {"momentum": 0.9, "coeff": 0.3}),
}


def rank_main(rounds: int, width: int) -> None:
    """Time every variant in turns; rank 0 writes the result as JSON to stdout."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
    from torch.nn.parallel import DistributedDataParallel

    import xutrain
    from xutrain.hooks import CompressedHook
    from xutrain.methods.codecs import fast

    rank, _ = laboratory.join()
    fast.load()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1024, 2 * width), nn.ReLU(), nn.Linear(2 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 128))

    def variant(name: str) -> tuple[Any, Any, Any]:
        cap = 1000 if name.startswith("powersgd") else 25  # torch's hook waits for a second collective: one bucket, or gloo may hang
        ddp = DistributedDataParallel(network(), bucket_cap_mb=cap)
        momentum = 0.0 if name.startswith("def") else 0.9
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=momentum)
        hook = None
        if name == "fp16":
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif name == "noop":
            ddp.register_comm_hook(None, debugging_hooks.noop_hook)
        elif name == "powersgd-1":
            state = powersgd.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
            ddp.register_comm_hook(state, powersgd.powerSGD_hook)
        elif name in HOOKED:
            codec, options, how = HOOKED[name]
            hook = CompressedHook(ddp, xutrain.codec(codec, **options), optimizer=optimizer, **how).attach()
        return ddp, optimizer, hook

    built = {name: variant(name) for name in VARIANTS}
    inputs, targets = torch.randn(BATCH, 1024), torch.randint(128, (BATCH,))

    def step(name: str) -> None:
        ddp, optimizer, hook = built[name]
        optimizer.zero_grad()
        if hook is None:
            nn.functional.cross_entropy(ddp(inputs), targets).backward()
        else:
            with hook.detached():
                nn.functional.cross_entropy(ddp(inputs), targets).backward()
        optimizer.step()

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sent: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for name in VARIANTS:
        for _ in range(WARM_UP):
            step(name)
    for _ in range(rounds):
        for name in VARIANTS:
            dist.barrier()
            before, start, busy = laboratory.counters()[1], time.perf_counter(), time.process_time()
            step(name)
            dist.barrier()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
            sent[name].append(laboratory.counters()[1] - before)
    if rank == 0:
        numel = sum(p.numel() for p in built["fp32"][0].parameters())
        rows = {
            n: {"step_s": statistics.median(times[n]), "cpu_s": statistics.median(cpu[n]), "sent_bytes": statistics.median(sent[n])}
            for n in VARIANTS
        }
        print(json.dumps({"parameters": numel, "variants": rows}))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def bits_on_the_wire(name: str, parameters: int, ranks: int) -> float:
    """Bits that a rank receives per step, in closed form (PowerSGD's factors from the network's shapes are left to the card)."""
    import xutrain

    if name in ("fp32", "fp16"):
        return 2 * (ranks - 1) / ranks * parameters * (32 if name == "fp32" else 16)
    if name in HOOKED:
        codec = xutrain.codec(HOOKED[name][0], **HOOKED[name][1])
        share = 2 * (ranks - 1) / ranks if codec.shared_support else ranks - 1
        return share * codec.payload_bits(parameters)
    return 0.0


def crossovers(results: dict[str, Any], ranks: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """For each variant: modelled speed-ups at the limited links, and the bandwidth below which it is ahead of fp32."""
    free, parameters = results["loopback"]["variants"], results["loopback"]["parameters"]
    wired = next((r["variants"] for link, r in results.items() if link != "loopback"), None)
    bits = {n: 8.0 * wired[n]["sent_bytes"] if wired else bits_on_the_wire(n, parameters, ranks) for n in free}
    rows, found = [], {}
    for name in free:
        if name in ("fp32", "noop"):
            continue
        extra = free[name]["step_s"] - free["fp32"]["step_s"]
        found[name] = (bits["fp32"] - bits[name]) / extra if extra > 0 else float("inf")
        row: dict[str, Any] = {"table": "crossover", "variant": name, "ahead of fp32 below Gbit/s": found[name] / 1e9}
        if extra <= 0:
            row["ahead of fp32 below Gbit/s"] = "any"
        for link, rate in (("1gbit", 1e9), ("100mbit", 1e8)):
            row[f"modelled x at {link}"] = (free["fp32"]["step_s"] + bits["fp32"] / rate) / (free[name]["step_s"] + bits[name] / rate)
            if link in results:
                there = results[link]["variants"]
                row[f"measured x at {link}"] = there["fp32"]["step_s"] / there[name]["step_s"]
        rows.append(row)
    return rows, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=list(laboratory.RATES), default=["loopback", "1gbit", "100mbit"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024, help="of the layers: 1024 gives 11.0 M parameters")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments(parser)
    given = parser.parse_args()
    if given.rank:
        rank_main(given.rounds, given.width)
    if given.quick:
        given.links, given.rounds, given.width = ["loopback", "1gbit"], 2, 256
    reason, notes = laboratory.missing(), []
    results: dict[str, Any] = {}
    for link in given.links:
        if laboratory.RATES[link] and reason:
            notes.append(f"{link}: left out ({reason}); see the modelled speed-ups.")
            print(notes[-1], file=sys.stderr)
            continue
        with laboratory.Laboratory(given.ranks, link) as lab:
            results[link] = lab.run([sys.executable, __file__, "--rank", "--rounds", str(given.rounds), "--width", str(given.width)])
    rows = []
    print(f"{'link':10}{'variant':12}{'s/step':>9}{'x fp32':>9}{'cpu s':>9}{'MB sent':>9}    (load {os.getloadavg()[0]:.1f})")
    for link, result in results.items():
        base = result["variants"]["fp32"]["step_s"]
        for name, row in result["variants"].items():
            print(f"{link:10}{name:12}{row['step_s']:9.3f}{base / row['step_s']:9.2f}{row['cpu_s']:9.3f}{row['sent_bytes'] / 1e6:9.3f}")
            mb = row["sent_bytes"] / 1e6 or None
            line = {"table": "steps", "link": link, "variant": name, "s/step": row["step_s"], "x fp32": base / row["step_s"]}
            rows.append({**line, "cpu s": row["cpu_s"], "MB sent": mb})
    ratios = []
    if "loopback" in results:
        curve, _ = crossovers(results, given.ranks)
        for row in curve:
            print(", ".join(f"{k} {v if isinstance(v, str) else f'{v:.2f}'}" for k, v in row.items() if k != "table"))
        rows += curve
        notes.append(f"{results['loopback']['parameters']:,} parameters, {given.ranks} ranks, {BATCH} samples a rank.")
    for link in ("1gbit", "100mbit"):
        if link not in results:
            continue
        there = results[link]["variants"]
        for name in ("def-64", "orq-3", "bingrad-b"):
            more = 1e3 * (there[name]["cpu_s"] - there["fp32"]["cpu_s"])
            less = 1e3 * 8 * (there["fp32"]["sent_bytes"] - there[name]["sent_bytes"]) / (laboratory.bandwidth(link) or 1e9)
            why = f"a rank computes {more:.0f} ms more in a step, and its link is busy {less:.0f} ms less"
            value = there["fp32"]["step_s"] / there[name]["step_s"]
            ratios.append(Ratio(f"{name}: step of fp32 / its step at {link}", value, ">= 1", why))
        if link == "100mbit":
            best = min(there[n]["step_s"] for n in HOOKED)
            ratios.append(Ratio(f"step of PowerSGD / best of ours at {link}", there["powersgd-1"]["step_s"] / best, ">= 1"))
            slowest = max(there[n]["step_s"] for n in HOOKED)
            ratios.append(Ratio(f"step of fp16 / slowest of ours at {link}", there["fp16"]["step_s"] / slowest, ">= 1"))
    write(given.json, "Data-parallel training steps", rows, ratios, notes=notes)


if __name__ == "__main__":
    main()
