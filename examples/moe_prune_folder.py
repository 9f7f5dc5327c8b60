"""MoE-Pruner as a function on a checkpoint folder: from disk to disk, one expert in memory at a time.

    python examples/moe_prune_folder.py                            a small random Mixtral, made here
    python examples/moe_prune_folder.py FOLDER OUT --pattern 2:4   your own Mixtral or Qwen-MoE checkpoint, as transformers saves it

Calibration tokens here are random; give your own text's for a model that is to be used.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from xutrain.methods.prune.checkpoint import prune_checkpoint


def small_mixtral(folder: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, 2:4, 4:8, ...")
    parser.add_argument("--sparsity", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder, out = args.folder or Path(made, "dense"), args.out or Path(made, "pruned")
        if args.folder is None:
            small_mixtral(folder)
        tokens = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(1))
        report = prune_checkpoint(folder, out, tokens, method="moe_pruner", sparsity=args.sparsity, pattern=args.pattern)
        model = AutoModelForCausalLM.from_pretrained(out)  # an ordinary checkpoint
        logits = model(tokens[:1]).logits
        assert bool(torch.isfinite(logits).all())
        print(f"{report.sparsity:.3f} of the expert weights are zero, mean output error {report.error:.3f}, {len(report.experts)} experts")


if __name__ == "__main__":
    main()
