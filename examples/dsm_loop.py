"""Distributed sign momentum around AdamW in a plain loop: ranks exchange once in ``--local-steps`` steps.

    torchrun --nproc-per-node 2 examples/dsm_loop.py [--local-steps 6]
    python examples/dsm_loop.py                                         one process: signed Lookahead

No DistributedDataParallel around the model, which would average gradients every step. A few seconds.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import xutrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local-steps", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]

    torch.manual_seed(rank)  # ranks may start from different weights: DSM gives all of them rank 0's
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dsm = xutrain.DSM(optimizer, local_steps=args.local_steps, eta=1.0, beta1=0.3, beta2=0.5, weight_decay=0.0)  # new

    rounds = 0
    for step in range(args.steps):
        at = train[torch.randint(len(train), (32,), generator=torch.Generator().manual_seed(1000 * step + rank))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[at]), targets[at]).backward()
        optimizer.step()
        rounds += dsm.step()  # new; True when a round has ended and all ranks hold the same model

    with dsm.evaluating(), torch.no_grad():  # new: the global model, also in the middle of a round
        accuracy = float((model(inputs[test]).argmax(1) == targets[test]).float().mean())
    if rank == 0:
        print(f"{ranks} ranks, {args.steps} steps, {rounds} exchanges: test accuracy {accuracy:.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine; leave it out between machines
    main()
