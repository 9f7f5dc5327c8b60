"""Any xutrain codec in a plain PyTorch DistributedDataParallel loop; the lines marked "new" are all that changes.

    torchrun --nproc-per-node 2 examples/ddp_hook.py                                        ORQ-9, no error feedback
    torchrun --nproc-per-node 2 examples/ddp_hook.py --codec random_block ratio=64 --feedback --coeff 0.5        DEF
    torchrun --nproc-per-node 2 examples/ddp_hook.py --codec bingrad_b --state residuals    saves each rank's state at the end

Handwritten digits that scikit-learn brings, an MLP, a few seconds.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import yaml
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import xutrain
from xutrain.hooks import CompressedHook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the codec, as `xutrain show codec NAME` lists them")
    parser.add_argument("--codec", default="orq", help="a name that `xutrain ls codecs` shows")
    parser.add_argument("--feedback", action="store_true", help="error feedback: send later what a message left out")
    coeff = "step ahead of the residual: DEF in (0, 1), SAEF at 1, or adaptive"
    parser.add_argument("--coeff", type=lambda text: text if text == "adaptive" else float(text), default=0.0, help=coeff)
    parser.add_argument("--mode", default="auto", choices=["auto", "allgather", "alltoall"], help="how messages reach everyone")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--state", help="save the hook's state in files of this name")
    args = parser.parse_args()
    options = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in args.options)}

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(inputs))
    train, test = order[:1437], order[1437:]

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    momentum = 0.0 if args.feedback else 0.9  # with error feedback momentum is local, before the exchange: in the hook
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    codec = xutrain.codec(args.codec, workers=ranks, **options)  # new
    hook = CompressedHook(  # new
        model,
        codec,
        optimizer=optimizer,
        error_feedback=args.feedback,
        momentum=0.9 if args.feedback else 0.0,
        coeff=args.coeff,
        mode="allgather" if args.feedback else args.mode,
    ).attach()

    steps = 0
    for epoch in range(args.epochs):
        mine = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))][rank::ranks]
        for at in mine[: len(train) // ranks].split(32):
            optimizer.zero_grad()
            with hook.detached():  # new; does nothing where coeff is 0
                nn.functional.cross_entropy(model(inputs[at]), targets[at]).backward()
            optimizer.step()
            steps += 1

    if args.state:  # new; load_state_dict takes it back, and CompressedHook.mean_state suits another number of ranks
        torch.save(hook.state_dict(), f"{args.state}-{rank}.pt")
    if rank == 0:
        accuracy = float((model(inputs[test]).argmax(1) == targets[test]).float().mean())
        full = 32 * sum(p.numel() for p in model.parameters()) * steps
        cost = f"sent {hook.bits / 8e3:.0f} kB a rank, {full / hook.bits:.1f} times less than fp32"
        print(f"{codec.label}: test accuracy {accuracy:.3f}, {cost}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine; leave it out between machines
    main()
