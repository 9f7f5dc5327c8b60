"""Attention pruned besides the experts (``targets: experts+attn``), which the stock Wanda code does and arXiv:2410.12013 does not.

Its matrices have no router weight, so they are cut by the ungated score, |W_ij| ||X_j|| for the methods that look at
data. Order inside a layer: the inputs of the attention matrices are summed with dense attention, attention is cut, and
the experts are calibrated with what the cut attention gives. Limit: sparsity 0 changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xutrain.engine.rng import Key
from xutrain.methods.prune.base import WeightMethod
from xutrain.methods.prune.forward import Forward
from xutrain.methods.prune.masks import Pattern
from xutrain.methods.prune.moments import squared_norms
from xutrain.models.decoder import Layer
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source


def linears(layer: Layer) -> dict[str, nn.Linear]:
    """The matrices of a layer's attention by the on-disk names of their weights."""
    prefix = layer.arch.layer_prefix(layer.index)
    found = ((name, m) for name, m in layer.self_attn.named_modules() if isinstance(m, nn.Linear))
    return {f"{prefix}self_attn.{name}.weight": module for name, module in found}


def names(arch: Architecture, source: Source) -> set[str]:
    """On-disk names of every attention matrix of a checkpoint."""
    prefixes = tuple(f"{arch.layer_prefix(i)}self_attn." for i in range(arch.layers))
    return {n for n, e in source.entries.items() if n.startswith(prefixes) and n.endswith(".weight") and len(e.shape) == 2}


@contextmanager
def _listening(modules: dict[str, nn.Linear], heard: dict[str, list[Tensor]]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0].reshape(-1, args[0].shape[-1])
            heard[name].append(squared_norms(z, z.new_ones(len(z))))

        return collect

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_sums(forward: Forward, layer: Layer, hidden: Tensor) -> dict[str, Tensor]:
    """s_j = sum over tokens of z_j^2 for the input z of every attention matrix, (d_in,); ``hidden`` (n, s, d) stays as it is.

    Batches are divided over processes and their sums added in the order of batches: equal for any number of processes.
    """
    modules = linears(layer)
    heard: dict[str, list[Tensor]] = {name: [] for name in modules}
    starts = list(range(0, len(hidden), forward.batch))
    share = -(-len(starts) // forward.workers.processes)
    with _listening(modules, heard):
        for start in starts[forward.workers.rank * share : (forward.workers.rank + 1) * share]:
            layer.attend(hidden[start : start + forward.batch], forward.rotary(hidden))
    found, wide = {}, torch.promote_types(hidden.dtype, torch.float32)
    for name, module in modules.items():
        none = torch.empty(0, module.in_features, dtype=wide, device=hidden.device)
        parts = torch.stack(heard[name]) if heard[name] else none
        found[name] = torch.cat(forward.workers.gather([parts])).sum(0)
    return found


def prune_attention(forward: Forward, layer: Layer, hidden: Tensor, method: WeightMethod, pattern: Pattern, key: Key) -> dict[str, Tensor]:
    """Cut the attention of one layer, in memory too; returns its new weights in the stored dtype, by name."""
    sums, written = input_sums(forward, layer, hidden), {}
    for number, (name, module) in enumerate(linears(layer).items()):
        pattern.check(module.in_features, name)
        stored = forward.source.read(name)
        mask = method.linear_mask(module.weight, sums[name], pattern, key.fold(worker=number))
        written[name] = torch.where(mask.cpu(), stored, torch.zeros((), dtype=stored.dtype))
        module.weight.data = written[name].to(module.weight)
    return written
