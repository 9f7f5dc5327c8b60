"""Tiny real checkpoints, written by transformers in several shards, and a whole-model reference of the pruning."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xutrain.methods.prune.masks import Pattern

COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "deepseek_v2": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "llama": {"intermediate_size": 48},
}


def save(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shards: str = "24KB", seed: int = 0, **more: Any) -> Any:
    """A random model of one family, saved by transformers; returns the model."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**{**COMMON, **CONFIGS[kind], **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens(n: int = 6, length: int = 24, vocab: int = 96, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def reference(folder: Path, calibration: Tensor, pattern: Pattern, batch: int = 8) -> dict[str, Tensor]:
    """MoE-Pruner on a whole transformers model in memory (fused experts of 5.x), by the plainest code: sort every row.

    Returns the pruned model's matrices by on-disk Mixtral names, in bfloat16.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16
    work = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(work.model.layers):
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        experts = layer.mlp.experts
        handle = experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        with torch.no_grad():
            for part in calibration.split(batch):
                work(part)
        handle.remove()
        x, at, g = (torch.cat([s[i] for s in seen]) for i in range(3))
        for e in range(experts.down_proj.shape[0]):
            token, slot = (at == e).nonzero(as_tuple=True)
            z, weight = x[token], g[token, slot].unsqueeze(1)
            w1, w3 = experts.gate_up_proj.data[e].chunk(2)
            w2 = experts.down_proj.data[e]
            h = F.silu(z @ w1.T) * (z @ w3.T)
            for name, w, inputs in (("w1", w1, z), ("w3", w3, z), ("w2", w2, h)):
                score = w.abs() * (weight * inputs).norm(dim=0)
                groups = score if pattern.of is None else score.view(-1, pattern.of)
                drop = int(groups.shape[1] * pattern.sparsity)
                order = torch.sort(groups, dim=1, stable=True).indices[:, :drop]
                keep = torch.ones_like(groups).scatter_(1, order, 0.0).view_as(w)
                w.mul_(keep)
                found[f"model.layers.{index}.block_sparse_moe.experts.{e}.{name}.weight"] = w.to(dtype).clone()
    return found
