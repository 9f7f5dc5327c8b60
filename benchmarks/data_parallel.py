"""One training step of an 11 M-parameter network on two ranks: DEF at ratio 64 against DDP in fp32, fp16 and with PowerSGD.

Usage: python benchmarks/data_parallel.py [--links loopback 1gbit 100mbit] [--rounds 5] [--json]
Loopback needs nothing. Limited links are two network namespaces joined by a veth pair with a token-bucket filter at both ends;
they need root, ip and tc, and are left out with a word where those are missing.
All variants live in the same two processes and take turns, so that a busy machine slows them alike. Medians; "sent" is what
the interface counted per step and rank; "cpu s" is what a rank computed, which a loaded machine stretches less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

WARM_UP, BATCH = 4, 16
RATES = {"loopback": None, "1gbit": ("1gbit", "512kb"), "100mbit": ("100mbit", "128kb")}


def rank_main(rank: int, store: str, address: str, rounds: int) -> None:
    """Time every variant in turns; rank 0 writes the result as JSON to stdout."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
    from torch.nn.parallel import DistributedDataParallel

    import xutrain
    from xutrain.hooks import CompressedHook

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:29511", rank=rank, world_size=2)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 128))

    def variant(name: str) -> tuple[Any, Any, Any]:
        cap = 1000 if name.startswith("powersgd") else 25  # torch's hook waits for a second collective: one bucket, or gloo may hang
        ddp = DistributedDataParallel(network(), bucket_cap_mb=cap)
        momentum = 0.0 if name.startswith("def") else 0.9
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=momentum)
        hook = None
        if name == "fp16":
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif name == "powersgd-1":
            state = powersgd.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
            ddp.register_comm_hook(state, powersgd.powerSGD_hook)
        elif name == "def-64":
            codec = xutrain.codec("random_block", ratio=64)
            hook = CompressedHook(ddp, codec, momentum=0.9, coeff=0.3, optimizer=optimizer).attach()
        return ddp, optimizer, hook

    names = ["fp32", "fp16", "powersgd-1", "def-64"]
    built = {name: variant(name) for name in names}
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

    times: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    sent: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        for _ in range(WARM_UP):
            step(name)
    for _ in range(rounds):
        for name in names:
            dist.barrier()
            before, start, busy = bytes_sent(), time.perf_counter(), time.process_time()
            step(name)
            dist.barrier()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
            sent[name].append(bytes_sent() - before)
    if rank == 0:
        numel = sum(p.numel() for p in built["fp32"][0].parameters())
        rows = {
            n: {
                "step_s": statistics.median(times[n]),
                "cpu_s": statistics.median(cpu[n]),
                "sent_bytes": statistics.median(sent[n]),
                "all_s": times[n],
            }
            for n in names
        }
        print(json.dumps({"parameters": numel, "variants": rows}))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def bytes_sent() -> int:
    """Bytes that left by this namespace's eth0; 0 where there is none of ours."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "xueth":
            return int(counters.split()[8])
    return 0


class Namespaces:
    """Two network namespaces joined by a limited link."""

    def __init__(self, rate: str, burst: str) -> None:
        self.names = [f"xu{os.getpid()}-{i}" for i in range(2)]
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "xueth", "netns", self.names[0], "type", "veth", "peer", "name", "xueth", "netns", self.names[1])
        for i, name in enumerate(self.names):
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "addr", "add", f"10.77.9.{i + 1}/24", "dev", "xueth")
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "link", "set", "xueth", "up")
            _run(*inside, "tc", "qdisc", "add", "dev", "xueth", "root", "tbf", "rate", rate, "burst", burst, "latency", "200ms")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def measure(link: str, rounds: int) -> dict[str, Any]:
    """Run both ranks over one link. Raises CalledProcessError or OSError where namespaces cannot be made."""
    limits, ranks = RATES[link], []
    spaces = Namespaces(*limits) if limits else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            address = "10.77.9.1" if spaces else "127.0.0.1"
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "xueth" if spaces else "lo"}
            command = [sys.executable, __file__, "--store", folder, "--address", address, "--rounds", str(rounds), "--rank"]
            inside = [["ip", "netns", "exec", name] for name in spaces.names] if spaces else [[], []]
            ranks = [
                subprocess.Popen(
                    [*inside[r], *command, str(r)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                for r in range(2)
            ]
            answer, _ = ranks[0].communicate(timeout=600)
            ranks[1].wait(timeout=60)
        return dict(json.loads(answer))
    finally:
        for process in ranks:
            process.kill()
        if spaces:
            spaces.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--links", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="127.0.0.1", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.store, given.address, given.rounds)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that namespaces are taken down
    can_limit = os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "tc"))
    results = {}
    for link in given.links:
        if RATES[link] and not can_limit:
            print(f"{link}: left out, needs root, ip and tc", file=sys.stderr)
            continue
        results[link] = measure(link, given.rounds)
    if given.json:
        print(json.dumps({"load": os.getloadavg()[0], "links": results}, indent=1))
        return
    print(f"{'link':10}{'variant':12}{'s/step':>9}{'x fp32':>9}{'cpu s':>9}{'MB sent':>9}    (load {os.getloadavg()[0]:.1f})")
    for link, result in results.items():
        base = result["variants"]["fp32"]["step_s"]
        for name, row in result["variants"].items():
            print(f"{link:10}{name:12}{row['step_s']:9.3f}{base / row['step_s']:9.2f}{row['cpu_s']:9.3f}{row['sent_bytes'] / 1e6:9.3f}")


if __name__ == "__main__":
    main()
