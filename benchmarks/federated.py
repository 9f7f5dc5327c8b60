"""Federated rounds on one core: xutrain's loop against a plain torch loop, pfl and Flower's simulation, at equal answers.

Usage:
    python benchmarks/federated.py [--rounds 50] [--pairs 7] [--json FILE] [--quick]    the task below, with every peer that is there
    python benchmarks/federated.py --scale [--clients 5000] [--json FILE] [--quick]     memory and time with the number of clients
    python benchmarks/federated.py --export FILE                                        the task's tensors, for peer scripts
    python benchmarks/peers/make.py pfl flower                                          the peers' environments (once)

The task: FedAvg, 10 clients that all take part, MLP 784-64-10 (50,890 parameters), 10 SGD steps of 20 samples each, lr 0.05.
All sides start from the same weights and take the same batches; their weights after 5 rounds must agree to 1e-5 before anything
is timed. CPU seconds per round: the plain loop and ours in interleaved blocks of rounds, medians over pairs; a peer in a program
of its own (``federated_peers.py``), all its processes counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from peers.make import python
from results import Ratio, arguments, write
from torch import nn

from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.loops import federated
from xutrain.recipe.load import from_dict

LR, CLIENTS, STEPS, BATCH = 0.05, 10, 10, 20
IMPORTS = time.process_time()  # CPU seconds until here: Python and the imports


def recipe(clients: int = CLIENTS, rounds: int = 50, samples: int = 2000, fraction: float = 1.0, method: str = "fedavg") -> Any:
    """The task as a recipe, on generated 28x28 images."""
    mapping = {
        "data": {"name": "synthetic_images", "size": 28, "channels": 1, "samples": samples, "test_samples": 500},
        "model": {"name": "mlp", "hidden": [64]},
        "partition": {"name": "iid"},
        "clients": {"count": clients, "fraction": fraction},
        "train": {"rounds": rounds, "local_steps": STEPS, "batch_size": min(BATCH, samples // clients), "lr": LR},
        "eval": {"every": 1000000},
        "method": {"name": method},
    }
    return from_dict("federate", mapping)


class Plain:
    """The loop that a researcher writes: one module, a state dict per client, torch.optim.SGD, data as float tensors."""

    def __init__(self, job: federated.Job) -> None:
        task, shards = job.task, job.parts
        whole = task.plain(torch.arange(task.num_train))
        self.images, self.labels = whole.inputs, whole.targets
        self.order = [lambda p, k=k, s=s: s.order(k, p, 0) for k, s in enumerate(shards)]
        self.per_pass = [s.per_pass for s in shards]
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        with torch.no_grad():
            nn.utils.vector_to_parameters(job.server["model"].clone(), self.module.parameters())
        self.server = {k: v.clone() for k, v in self.module.state_dict().items()}
        self.round = 0

    def play(self) -> None:
        total = {k: torch.zeros_like(v) for k, v in self.server.items()}
        for k in range(len(self.order)):
            self.module.load_state_dict(self.server)
            optimizer = torch.optim.SGD(self.module.parameters(), lr=LR)
            for step in range(STEPS):
                pass_, at = divmod(self.round * STEPS + step, self.per_pass[k])
                if step == 0 or at == 0:
                    order = self.order[k](pass_)
                rows = order[at * BATCH : (at + 1) * BATCH]
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.module(self.images[rows]), self.labels[rows]).backward()
                optimizer.step()
            for name, value in self.module.state_dict().items():
                total[name].add_(value, alpha=1 / len(self.order))
        self.server = total
        self.round += 1

    def flat(self) -> torch.Tensor:
        return torch.cat([v.reshape(-1) for v in self.server.values()])


class Ours:
    """The same task through xutrain's loop."""

    def __init__(self, value: Any) -> None:
        self.recipe = value
        self.job = federated.build(value, Context())
        self.round = 0

    def play(self) -> None:
        federated.play(self.job, self.job.method.configure(self.job.server, federated.plan_round(self.recipe, self.job, self.round)))
        self.round += 1


def cpu(work: Any, rounds: int) -> float:
    """CPU seconds per round."""
    start = time.process_time()
    for _ in range(rounds):
        work.play()
    return (time.process_time() - start) / rounds


def compare(rounds: int, pairs: int) -> tuple[dict[str, float], torch.Tensor]:
    """Equal answers first, then interleaved blocks; our weights after 5 rounds besides."""
    torch.set_num_threads(1)
    ours = Ours(recipe())
    plain = Plain(ours.job)
    for _ in range(5):
        ours.play()
        plain.play()
    after = ours.job.server["model"].clone()
    gap = float((after - plain.flat()).abs().max())
    if gap > 1e-5:
        raise SystemExit(f"final weights differ by {gap:.3g}; nothing was timed")
    times = [(cpu(plain, rounds), cpu(ours, rounds)) for _ in range(pairs)]
    measured = {
        "gap": gap,
        "plain": statistics.median(t[0] for t in times),
        "xutrain": statistics.median(t[1] for t in times),
        "ratio": statistics.median(t[1] / t[0] for t in times),
    }
    return measured, after


def peer(name: str, rounds: int, ours: torch.Tensor) -> dict[str, Any] | None:
    """What ``federated_peers.py`` says of a peer in its environment; None where there is none.

    Raises:
        SystemExit: its weights after 5 rounds are not ours.
    """
    inside = python(name)
    if inside is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        task, weights = Path(folder, "task.pt"), Path(folder, "weights.pt")
        export(str(task))
        script = Path(__file__).with_name("federated_peers.py")
        command = [str(inside), str(script), name, str(task), "--rounds", str(rounds), "--weights", str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
        gap = float((torch.load(weights, weights_only=True) - ours).abs().max())
    if gap > 1e-5:
        raise SystemExit(f"the weights of {name} differ by {gap:.3g}; nothing can be compared")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**answer, "gap": gap}


def task_table(rounds: int, pairs: int, quick: bool) -> tuple[list[dict[str, Any]], list[Ratio]]:
    """Rows of all systems, and what was aimed at."""
    footprint, start = apart(memory), apart(start_up)
    measured, after = compare(rounds, pairs)
    overhead = (measured["xutrain"] - measured["plain"]) / CLIENTS * 1e3
    rows: list[dict[str, Any]] = [
        {"system": "plain torch loop", "cpu_s_per_round": measured["plain"], "memory_mb": "", "cpu_s_to_first_round": "", "processes": 1,
         "largest_weight_gap": 0.0},
        {"system": "xutrain", "cpu_s_per_round": measured["xutrain"], "memory_mb": footprint["peak_rss_mb"],
         "cpu_s_to_first_round": start["one_round_run_cpu_s"], "processes": 1, "largest_weight_gap": measured["gap"]},
    ]  # fmt: skip
    found: dict[str, float] = {}
    why = "its environment is not there: python benchmarks/peers/make.py pfl flower"
    for name in ("pfl", "flower"):
        theirs = peer(name, 10 if quick else 40, after)
        if theirs is not None:
            found[name] = theirs["cpu_s_per_round"]
            rows.append({"system": name, "largest_weight_gap": theirs["gap"], **{k: theirs[k] for k in rows[0] if k in theirs}})
    pfl, flower = found.get("pfl"), found.get("flower")
    own = measured["xutrain"]
    ratios = [
        Ratio("CPU time of a round, xutrain / plain loop", measured["ratio"], "<= 1.1"),
        Ratio("rounds per CPU second, xutrain / pfl", pfl / own if pfl else None, ">= 1", "" if pfl else why),
        Ratio("CPU time of a round, xutrain / Flower", own / flower if flower else None, "<= 0.333", "" if flower else why),
        Ratio("ms per client call above the plain loop", overhead, "<= 2"),
        Ratio("peak memory of ten clients, MB", footprint["peak_rss_mb"], "<= 400"),
        Ratio("of which the imports, MB", footprint["rss_of_imports_mb"]),
    ]
    return rows, ratios


def apart(work: Any, *arguments: Any) -> Any:
    """What ``work`` returns in a process of its own, so that memory peaks do not add up."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, json.dumps(work(*arguments)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        value = json.loads(answer.read())
    os.waitpid(child, 0)
    return value


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, float]:
    """Peak memory of ten rounds of the task, and what of it the imports (torch above all) already hold."""
    torch.set_num_threads(1)
    imports = peak_mb()
    ours = Ours(recipe())
    for _ in range(10):
        ours.play()
    return {"rss_of_imports_mb": imports, "peak_rss_mb": peak_mb(), "peak_above_imports_mb": peak_mb() - imports}


def scale(most: int, rounds: int) -> tuple[list[dict[str, Any]], list[Ratio]]:
    """10 % of the clients taking part, each size in a process of its own: CPU per client call, and memory."""
    sizes = [c for c in (100, 200, 500, 1000, 2000, 5000) if c <= most]
    rows = [apart(_scale_one, clients, rounds, method) for method in ("fedavg", "scaffold") for clients in sizes]
    ratios = []
    for method in ("fedavg", "scaffold"):
        small, large = ([r for r in rows if r["method"] == method][i] for i in (0, -1))
        grown = large["peak_rss_mb"] - small["peak_rss_mb"]
        explained = large["data_mb"] - small["data_mb"] + large["client_states_mb"] - small["client_states_mb"]
        per = large["cpu_ms_per_client_call"] / small["cpu_ms_per_client_call"]
        ratios.append(Ratio(f"{method}: ms per client call, {large['clients']} clients / {small['clients']}", per, "<= 1.25"))
        ratios.append(
            Ratio(
                f"{method}: memory from {small['clients']} to {large['clients']} clients beside samples and clients' states, kB a client",
                (grown - explained) * 1024 / (large["clients"] - small["clients"]),
                "<= 50",
            )
        )
    return rows, ratios


def _scale_one(clients: int, rounds: int, method: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    value = recipe(clients, rounds, samples=50 * clients, fraction=0.1, method=method)
    ours = Ours(value)
    ours.play()
    before = peak_mb()
    start = time.process_time()
    for _ in range(rounds):
        ours.play()
    each = (time.process_time() - start) / rounds
    peak = peak_mb()
    states = sum(t.numel() * 4 for kept in ours.job.kept.values() for t in kept.state.values() if isinstance(t, torch.Tensor)) / 2**20
    return {
        "clients": clients,
        "method": method,
        "taking_part": value.per_round,
        "cpu_s_per_round": each,
        "cpu_ms_per_client_call": each / value.per_round * 1e3,
        "rss_after_first_round_mb": before,
        "peak_rss_mb": peak,
        "client_states_mb": states,
        "data_mb": ours.job.task.num_train * 784 / 2**20,
    }


def start_up() -> dict[str, float]:
    """CPU seconds of a whole one-round run: imports, data, partition, round, measurement, checkpoint."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context()
        record = Record(Path(folder), ctx.meter)
        federated.run(recipe(rounds=1), ctx, record)
        record.close()
    return {"one_round_run_cpu_s": IMPORTS + time.process_time() - begin}


def export(path: str) -> None:
    """Initial weights, images, labels and every batch of 60 rounds, so that a peer can take the same steps."""
    ours = Ours(recipe())
    whole = ours.job.task.plain(torch.arange(ours.job.task.num_train))
    batches = []
    for k, shard in enumerate(ours.job.parts):
        rows = []
        for step in range(60 * STEPS):
            pass_, at = divmod(step, shard.per_pass)
            rows.append(shard.order(k, pass_, 0)[at * BATCH : (at + 1) * BATCH])
        batches.append(torch.stack(rows))
    torch.save({"model": ours.job.server["model"], "images": whole.inputs, "labels": whole.targets, "batches": torch.stack(batches)}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="rounds of a block")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of blocks")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--clients", type=int, default=5000, help="most clients of --scale")
    parser.add_argument("--export", metavar="FILE")
    arguments(parser)
    given = parser.parse_args()
    if given.export:
        export(given.export)
        return
    rounds, pairs = (10, 3) if given.quick else (given.rounds, given.pairs)
    if given.scale:
        rows, ratios = scale(min(given.clients, 500) if given.quick else given.clients, 3 if given.quick else 10)
        title = "Federated rounds with the number of clients, 10 % taking part, 50 samples each"
    else:
        rows, ratios = task_table(rounds, pairs, given.quick)
        title = "FedAvg of ten clients at equal weights: MLP 784-64-10, 10 steps of 20 samples"
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    for ratio in ratios:
        value = "not measured: " + ratio.why if ratio.value is None else f"{ratio.value:.3g}"
        verdict = "" if ratio.met is None else f"  aim {ratio.aim}, {'met' if ratio.met else 'MISSED'}"
        print(f"{ratio.name}: {value}{verdict}")
    write(given.json, title, rows, ratios)


if __name__ == "__main__":
    main()
