"""The task of ``federated.py`` in pfl and in Flower's simulation, from the same weights on the same batches.

    python benchmarks/peers/make.py pfl flower                            # once: an environment each, .bench/NAME
    python benchmarks/federated.py                                        # makes the task, runs the peers, compares

or by hand: ``python benchmarks/federated.py --export task.pt`` and ``.bench/NAME/bin/python benchmarks/federated_peers.py NAME task.pt
--rounds 30 --weights after_5.pt``. Prints one JSON object: CPU seconds per round of all processes of the peer, memory of all of
them (shared pages split among those that share them), seconds to the end of the first round. Runs without xutrain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import torch
from torch import nn

MARK = "BENCHMARK_MARK"
LR, CLIENTS, STEPS, BATCH, WARM = 0.05, 10, 10, 20, 5
BEGAN = time.time()


def net(flat: torch.Tensor | None = None) -> nn.Sequential:
    """MLP 784-64-10 at the given weights."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    if flat is not None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(flat.clone(), module.parameters())
    return module


def processes() -> list[Path]:
    """/proc folders of this program and of all that it started."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
        except OSError:
            continue
    return found


def cpu_seconds() -> float:
    """CPU seconds that these processes have used."""
    ticks = 0
    for folder in processes():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mb() -> float:
    """Memory of these processes; a page that several share counts once in sum."""
    total = 0
    for folder in processes():
        try:
            total += sum(int(line.split()[1]) for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        except OSError:
            continue
    return total / 1024


class Watch:
    """Called after every round."""

    def __init__(self, weights: Path | None) -> None:
        self.weights, self.seconds, self.walls = weights, list[float](), list[float]()
        self.memory, self.count = 0.0, 0

    def __call__(self, flat: torch.Tensor) -> None:
        self.seconds.append(cpu_seconds())
        self.walls.append(time.time() - BEGAN)
        if len(self.seconds) == WARM:
            if self.weights:
                torch.save(flat.detach().clone(), self.weights)
            self.memory, self.count = memory_mb(), len(processes())

    def result(self) -> dict[str, Any]:
        rounds = len(self.seconds) - WARM
        each = (self.seconds[-1] - self.seconds[WARM - 1]) / rounds
        walls = statistics.median(b - a for a, b in pairwise(self.walls[WARM - 1 :]))
        return {
            "cpu_s_per_round": each,
            "wall_s_per_round": walls,
            "cpu_s_to_first_round": self.seconds[0],
            "wall_s_to_first_round": self.walls[0],
            "memory_mb": self.memory,
            "processes": self.count,
            "rounds": rounds,
        }


def run_pfl(file: Path, rounds: int, watch: Watch) -> None:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    task = torch.load(file, weights_only=True)

    class Net(nn.Module):
        """The network with the loss that pfl asks of a model."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = net(task["model"])

        def loss(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> torch.Tensor:
            return nn.functional.cross_entropy(self.layers(images), labels)

        def metrics(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> dict[str, Any]:
            return {}

    module = Net()
    model = PyTorchModel(module, lambda parameters, lr: torch.optim.SGD(parameters, lr=lr), torch.optim.SGD(module.parameters(), lr=1.0))
    calls = [0]

    def user(name: int) -> Dataset:
        round_, calls[0] = calls[0] // CLIENTS, calls[0] + 1
        rows = task["batches"][name, round_ * STEPS : (round_ + 1) * STEPS].reshape(-1)
        return Dataset([task["images"][rows], task["labels"][rows]], user_id=str(name))

    order = iter(range(10**9))
    data = FederatedDataset(user, lambda: next(order) % CLIENTS)

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            watch(nn.utils.parameters_to_vector(module.parameters()))
            return False, Metrics()

    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=rounds, evaluation_frequency=10**6, train_cohort_size=CLIENTS, val_cohort_size=0),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH, local_max_grad_norm=None, local_num_steps=None
        ),
        None,
        [Clock()],
    )


def _task(file: str) -> dict[str, Any]:
    """The task, read once a process: a worker of Flower's is sent this function anew with every call, a module stays."""
    held = sys.modules.setdefault("benchmark_task", types.ModuleType("benchmark_task")).__dict__
    if file not in held:
        torch.set_num_threads(1)
        held[file] = torch.load(file, weights_only=True)
    loaded: dict[str, Any] = held[file]
    return loaded


def run_flower(file: Path, rounds: int, watch: Watch) -> None:
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    name = str(file.resolve())
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Any, context: Any) -> Any:
        task = _task(name)
        k, at = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
        module = net()
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        for rows in task["batches"][k, at * STEPS : (at + 1) * STEPS]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(task["images"][rows]), task["labels"][rows]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": STEPS * BATCH})}
        return type(message)(RecordDict(content), reply_to=message)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        def after(round_: int, arrays: Any) -> None:
            if round_:
                watch(torch.cat([v.reshape(-1) for v in arrays.to_torch_state_dict().values()]))

        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        strategy.start(grid, ArrayRecord(net(_task(name)["model"]).state_dict()), num_rounds=rounds, evaluate_fn=after)

    resources = {"init_args": {"num_cpus": os.cpu_count() or 1}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["pfl", "flower"])
    parser.add_argument("task", type=Path)
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds, after 5 that are not")
    parser.add_argument("--weights", type=Path, help="write the weights after 5 rounds here")
    given = parser.parse_args()
    if MARK not in os.environ:  # all that comes of this process carries it, and so must the process itself
        os.environ[MARK] = uuid.uuid4().hex
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    watch = Watch(given.weights)
    {"pfl": run_pfl, "flower": run_flower}[given.peer](given.task, WARM + given.rounds, watch)
    print(json.dumps(watch.result()))


if __name__ == "__main__":
    main()
