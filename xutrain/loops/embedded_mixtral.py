"""Train the small Mixtral that `xutrain prune` uses when no checkpoint is given; once per setting and seed, then cached.

Bytes of real text, next-byte loss, and a load-balancing loss per layer: n sum_e f_e p_e (Switch, arXiv:2101.03961), with
f_e the share of routing slots and p_e the mean probability of expert e. Per layer matters: averaged over layers, as some
libraries do, single layers may collapse onto a few experts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F

from xutrain.data.windows import BYTES, embedded
from xutrain.engine.rng import Key
from xutrain.errors import Diverged, Issue, RecipeError, Stopped
from xutrain.models.decoder import Decoder
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source, write_checkpoint


def config_of(size: Any) -> dict[str, Any]:
    """config.json of the embedded model, as transformers reads it."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": BYTES,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "num_local_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def balance_loss(trace: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """Mean over layers of n sum_e f_e p_e; 1 when the load is even."""
    total = trace[0][3].new_zeros(())
    for _, index, _, prob in trace:
        n = prob.shape[1]
        share = torch.bincount(index.flatten(), minlength=n).to(prob.dtype) / index.numel()
        total = total + n * (share * prob.mean(0)).sum()
    return total / len(trace)


def fetch(size: Any, seed: int, cache: Path, say: Callable[[int, int, float], None], stop: Callable[[], bool]) -> Path:
    """The folder of the trained model, trained now if it is not in the cache. One process trains, others wait for the lock."""
    plain = size.model_copy(update={"outliers": False})
    base = fetch(plain, seed, cache, say, stop) if size.outliers else None
    name = hashlib.sha256(json.dumps([size.model_dump(), seed, 1], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(str(cache / f"{name}.lock")):
        if not (folder / "config.json").exists():
            if base is None:
                state = train(size, seed, say, stop).state_dict()
            else:
                source = Source(base)
                state = with_outliers({n: source.read(n) for n in source.entries}, Architecture.read(base), Key(seed, "embedded/outliers"))
            write_checkpoint(folder, state, config_of(size))
    return folder


def train(size: Any, seed: int, say: Callable[[int, int, float], None], stop: Callable[[], bool]) -> Decoder:
    """Train from scratch; AdamW, warm-up over 5 % of the steps, cosine to 3 %, weight decay on matrices, clip at 1."""
    model = Decoder(Architecture.of(config_of(size)))
    model.initialise(Key(seed, "embedded/init").generator(), std=0.02 * math.sqrt(128 / size.hidden))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95))
    data = embedded()["train"]
    if size.length >= len(data):
        raise RecipeError(Issue("model.embedded.length", f"the embedded text has {len(data)} bytes", size.length, "lower it"))
    for step in range(size.steps):
        if stop():
            raise Stopped(Issue("model.embedded", f"stopped while the model was trained, step {step} of {size.steps}", has_value=False))
        warm = min(1.0, (step + 1) / max(1, size.steps // 20))
        factor = warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / size.steps)))
        for group in optimizer.param_groups:
            group["lr"] = size.lr * factor
        starts = torch.randint(len(data) - size.length, (size.batch_size,), generator=Key(seed, "embedded/batch", step).generator())
        batch = torch.stack([data[s : s + size.length + 1] for s in starts.tolist()])
        trace: list[Any] = []
        logits = model(batch[:, :-1], trace)
        ce = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        (ce + size.balance * balance_loss(trace)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss := float(ce.detach())):
            raise Diverged(Issue("model.embedded", f"the loss is not finite at step {step}", loss, "lower model.embedded.lr"))
        say(step + 1, size.steps, loss)
    return model.eval()


def with_outliers(state: dict[str, Tensor], arch: Architecture, key: Key) -> dict[str, Tensor]:
    """The same function with unequal channels: gains of the norm times c and W1, W3, router columns divided by c;
    W3 rows times u and W2 columns divided by u, with c and u exp of normal numbers. Weights then look like a large model's."""
    state = dict(state)
    for layer in range(arch.layers):
        generator = key.fold(step=layer).generator()
        c = torch.randn(arch.hidden, generator=generator).exp()
        gain = f"{arch.layer_prefix(layer)}post_attention_layernorm.weight"
        state[gain] = state[gain] * c
        state[arch.router_name(layer)] = state[arch.router_name(layer)] / c
        for e in range(arch.experts):
            u = torch.randn(arch.ffn, generator=generator).exp()
            gate, up, down = (arch.expert_name(layer, e, role) for role in ("gate", "up", "down"))
            state[gate] = state[gate] / c
            state[up] = state[up] / c * u.unsqueeze(1)
            state[down] = state[down] / u
    return state
