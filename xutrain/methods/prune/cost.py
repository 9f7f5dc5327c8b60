"""What a pruning will cost, from the shape of the model alone: memory, bytes, operations, and a guess of the time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from xutrain.errors import DataError, Issue
from xutrain.methods.prune.base import WeightMethod
from xutrain.methods.prune.drop import ExpertMethod
from xutrain.methods.prune.moments import Hessians, PathMoments
from xutrain.methods.prune.naee import NAEE
from xutrain.models.moe import Architecture

#: Sequential disk rate that the time is stated for; divide by yours.
DISK_GB_S = 1.0
#: An expert that gets this multiple of the mean number of tokens still fits the stated memory.
IMBALANCE = 2.0
#: What memory pools and kernels' scratch space take besides.
ALLOCATOR = 64 << 20
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """Counts of weights that follow from config.json."""

    expert: int
    experts: int
    attention: int
    others: int

    @property
    def total(self) -> int:
        return self.expert * self.experts + self.others

    @classmethod
    def of(cls, arch: Architecture) -> Shape:
        """Raises DataError for a config.json that lacks a size, or has something else there."""
        try:
            return cls._of(arch)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as reason:
            raise DataError(Issue("config.json", f"a size is missing or no number: {reason}", has_value=False)) from None

    @classmethod
    def _of(cls, arch: Architecture) -> Shape:
        c, d = arch.config, arch.hidden
        heads = int(c.get("num_attention_heads", 1))
        if arch.family.model_type == "deepseek_v2":
            rope, nope, v, rank = (int(c[k]) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
            low = c.get("q_lora_rank")
            q = d * int(low) + int(low) * heads * (rope + nope) if low else d * heads * (rope + nope)
            attention = q + d * (rank + rope) + rank * heads * (nope + v) + heads * v * d
        else:
            head = int(c.get("head_dim") or d // heads)
            attention = d * head * (2 * heads + 2 * int(c.get("num_key_value_heads") or heads))
        sparse = 0 if arch.dense else len(arch.pruned_layers)
        dense_layers = arch.layers - len(arch.pruned_layers)
        shared = 0
        if arch.family.shared:
            ffn = int(c.get("shared_expert_intermediate_size") or arch.ffn * int(c.get("n_shared_experts") or 1))
            shared = 3 * d * ffn
        ends = arch.vocab * d * (1 if c.get("tie_word_embeddings") else 2)
        others = arch.layers * (attention + 2 * d) + sparse * (d * arch.experts + shared) + ends + d
        others += dense_layers * 3 * d * int(c.get("intermediate_size", 0))
        return cls(arch.expert_parameters, len(arch.pruned_layers) * arch.experts, attention, others)


def peak_bytes(
    arch: Architecture,
    method: WeightMethod | ExpertMethod,
    tokens: int,
    length: int,
    compute: str,
    batch: int,
    chunk: int,
    rescale: bool,
    processes: int = 1,
) -> dict[str, int]:
    """Estimate of what one process holds at once, by part, beyond what the interpreter holds after its imports.

    Measured on a Mixtral with experts of 11 M weights: 0.314 GB (float32), where this says 0.39.
    """
    c, w = _BYTES[compute], _BYTES.get(arch.dtype, 4)
    d, f = arch.hidden, arch.ffn
    size = arch.expert_parameters
    routed = int(min(tokens, IMBALANCE * tokens * arch.top_k / arch.experts))
    hidden = 2 * tokens * d * c + tokens * arch.top_k * (8 + 4) + 2 * tokens * arch.experts * 4
    if processes > 1:
        hidden += tokens * d * c  # gathered copies
    attention = Shape.of(arch).attention * (c + w) + 10 * batch * length * d * c
    attention += arch.vocab * d * w if not attention else 0
    # dense, pruned (twice while it is cast) and stored matrices, masks, scores in float32, order statistic of the largest matrix
    expert = size * (3 * c + w + 1 + 4) + d * f * 16
    kind = getattr(method, "statistics", None)
    sums = (d + f) * 4
    if kind is PathMoments:
        sums = 2 * d * f * 4
    elif kind is Hessians:
        sums = (d * d + f * f) * 4 + 4 * max(d, f) ** 2 * 4
    outputs = routed * d * c * 3 + min(routed, chunk) * (5 * f + 3 * d) * c
    if rescale:
        expert += size * c
        outputs += min(routed, chunk) * 2 * max(d, f) * c
    if isinstance(method, NAEE):  # every expert of a layer, and all their outputs for some tokens, twice while they are stacked
        together = min(tokens, int(method.options.batch_tokens))  # type: ignore[attr-defined]
        expert = arch.experts * size * c + size * w
        outputs += together * (2 * arch.experts * d * c + 5 * f * c + 2 * arch.top_k * d * c + 2 * d * 8)
    elif isinstance(method, ExpertMethod):
        outputs += 2 * routed * d * 8  # norms are taken in float64
    parts = {
        "allocator": ALLOCATOR,
        "hidden_states": hidden,
        "attention": attention,
        "expert": expert,
        "statistics": int(sums),
        "expert_tokens": outputs,
    }
    return {**parts, "total": ALLOCATOR + hidden + max(attention, expert + int(sums) + outputs)}


def evaluation_bytes(arch: Architecture, length: int, compute: str, batch: int, chunk: int, errors: bool) -> tuple[int, int]:
    """Estimate of what measuring holds at once: a fixed part, and a part per window of text.

    errors: also the output error of each layer, which holds the dense and the lost output of every token.
    """
    c, w = _BYTES[compute], _BYTES.get(arch.dtype, 4)
    d, f, pair = arch.hidden, arch.ffn, 2 if errors else 1
    share = min(1.0, IMBALANCE * arch.top_k / arch.experts)
    window = length * (2 * d * c + arch.top_k * 12 + 2 * arch.experts * 4 + (2 * d * c if errors else 0) + share * 3 * pair * d * c)
    expert = arch.expert_parameters * (c + w) * pair + chunk * (5 * f + 3 * d) * c
    head = arch.vocab * d * (c + w) + length * arch.vocab * (c + 8)
    attention = Shape.of(arch).attention * (c + w) + 10 * batch * length * d * c
    return ALLOCATOR + max(expert, head, attention), int(window)


def operations(arch: Architecture, method: WeightMethod | ExpertMethod, tokens: int, length: int, rescale: bool) -> float:
    """Floating-point operations of one calibration and pruning."""
    d, f, sparse = arch.hidden, arch.ffn, len(arch.pruned_layers)
    slots = tokens * arch.top_k * sparse
    o = method.options
    every = isinstance(method, NAEE) or getattr(o, "all_tokens", False) or getattr(o, "gate", None) == "all_tokens"
    seen = tokens * arch.experts * sparse if every else slots  # tokens that each expert is calibrated with
    total = 2.0 * arch.expert_parameters * (seen + slots + (2 * seen if rescale else 0))
    total += arch.layers * (2.0 * Shape.of(arch).attention * tokens + 2.0 * d * length * tokens)
    kind = getattr(method, "statistics", None)
    if kind is PathMoments:
        total += seen * 4.0 * d * f
    if kind is Hessians:
        total += seen * 2.0 * (d * d + f * f) + arch.experts * sparse * (4.0 * (2 * d**3 + f**3) + 4.0 * d * f * (d + f))
    return total


def matmul_rate(compute: str, device: torch.device, size: int = 768) -> float:
    """Operations per second of this machine, timed for a moment with the present number of threads."""
    a = torch.randn(size, size, device=device).to(getattr(torch, compute))
    a @ a
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        float((a @ a)[0, 0])
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - started)


def forecast(arch: Architecture, method: WeightMethod | ExpertMethod, samples: int, length: int, options: Any) -> dict[str, Any]:
    """The forecast of a recipe's pruning step as plain numbers: bytes, operations, seconds."""
    shape, w = Shape.of(arch), _BYTES.get(arch.dtype, 4)
    tokens = samples * length
    peak = peak_bytes(arch, method, tokens, length, options.compute, options.batch, options.chunk, options.rescale)
    measuring = evaluation_bytes(
        arch, options.evaluation.length, options.compute, options.batch, options.chunk, options.evaluation.local_error
    )
    flop = operations(arch, method, tokens, length, options.rescale)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(options.compute, device)
    disk = 2 * shape.total * w / (DISK_GB_S * 1e9)
    states = max(0, arch.layers - 1) // (options.checkpoint.every or 1) * tokens * arch.hidden * _BYTES[options.compute]
    return {
        "model_type": arch.family.model_type,
        "parameters": shape.total,
        "expert_parameters": shape.expert * shape.experts,
        "expert_share": shape.expert * shape.experts / shape.total,
        "calibration_tokens": tokens,
        "peak_bytes": peak["total"],
        "peak_parts": {k: v for k, v in peak.items() if k != "total"},
        "evaluation_bytes_fixed": measuring[0],
        "evaluation_bytes_per_window": measuring[1],
        "bytes_read": shape.total * w,
        "bytes_written": shape.total * w,
        "bytes_of_hidden_states_written": states,
        "operations": flop,
        "operations_per_second_here": rate,
        "seconds_compute": flop / rate,
        "seconds_disk": disk,
        "disk_gb_per_second_assumed": DISK_GB_S,
    }
