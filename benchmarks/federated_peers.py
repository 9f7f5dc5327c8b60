"""The task of ``federated.py`` in pfl, from the same weights on the same batches. Run it in an environment that has pfl:

    python benchmarks/federated.py --export /tmp/task.pt
    /path/to/env/bin/python benchmarks/federated_peers.py pfl /tmp/task.pt

Prints the sum of absolute weights after 5 rounds (compare with ``federated.py``), CPU seconds per round and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")
import torch
from torch import nn

LR, CLIENTS, STEPS, BATCH = 0.05, 10, 10, 20


class Net(nn.Module):
    """MLP 784-64-10 with the loss that pfl asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> torch.Tensor:
        return nn.functional.cross_entropy(self(images), labels)

    def metrics(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> dict[str, Any]:
        return {}


def run_pfl(task: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    net = Net()
    with torch.no_grad():
        nn.utils.vector_to_parameters(task["model"].clone(), net.parameters())
    model = PyTorchModel(net, lambda parameters, lr: torch.optim.SGD(parameters, lr=lr), torch.optim.SGD(net.parameters(), lr=1.0))
    calls = [0]

    def user(name: int) -> Dataset:
        round_, calls[0] = calls[0] // CLIENTS, calls[0] + 1
        rows = task["batches"][name, round_ * STEPS : (round_ + 1) * STEPS].reshape(-1)
        return Dataset([task["images"][rows], task["labels"][rows]], user_id=str(name))

    order = iter(range(10**9))
    data = FederatedDataset(user, lambda: next(order) % CLIENTS)
    stamps: list[float] = []
    sums: list[float] = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            stamps.append(time.process_time())
            sums.append(float(sum(p.detach().abs().sum() for p in net.parameters())))
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
    each = [b - a for a, b in pairwise(stamps[5:])]
    return {
        "sum_of_absolute_weights_after_5": sums[4],
        "cpu_s_per_round": statistics.median(each),
        "rounds_per_cpu_s": 1 / statistics.median(each),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["pfl"])
    parser.add_argument("task")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run_pfl(torch.load(given.task, weights_only=True), 60), indent=2))


if __name__ == "__main__":
    main()
