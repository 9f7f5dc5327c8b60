"""A compressed exchange under Hugging Face's Trainer: one subclass, four lines. Needs ``pip install 'xutrain[trainer]'``.

    torchrun --nproc-per-node 2 examples/hf_trainer.py [--codec orq] [--steps 60]

A two-layer GPT-2 learns to count modulo 97; nothing is downloaded. Trainer wraps the model in DistributedDataParallel under
torchrun; on a single process there is nothing to exchange, and the hook is left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine; leave it out between machines
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import xutrain
from xutrain.hooks import CompressedHook
from xutrain.methods.codecs.base import Codec


class CompressedTrainer(Trainer):
    """Trainer whose gradients are exchanged through ``codec``."""

    def __init__(self, *args: Any, codec: Codec, error_feedback: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.codec, self.error_feedback = codec, error_feedback
        self.hook: CompressedHook | None = None

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.hook is None and isinstance(model, DistributedDataParallel):  # wrapped now, before the first backward
            self.hook = CompressedHook(model, self.codec, error_feedback=self.error_feedback, mode="allgather").attach()
        return super().training_step(model, *args, **kwargs)


class Counting(Dataset):
    """Sequences a, a + b, a + 2b, ... modulo 97."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, stride = index % 97, 1 + index // 97 % 5
        tokens = (first + stride * torch.arange(24)) % 97
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="orq", help="a name that `xutrain ls codecs` shows")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=max(1, args.steps // 6),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
        )
        trainer = CompressedTrainer(model=model, args=settings, train_dataset=Counting(), codec=xutrain.codec(args.codec))
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if trainer.is_world_process_zero():
            sent = f"{trainer.hook.bits / 8e6:.2f} MB sent a rank" if trainer.hook else "one process, nothing exchanged"
            print(f"{args.codec}: loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}, {sent}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
