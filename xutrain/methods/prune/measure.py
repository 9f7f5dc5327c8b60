"""What pruning did: perplexity of a checkpoint, and the error of each MoE layer's output. Streamed like the pruning itself."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from xutrain.engine.workers import Workers
from xutrain.methods.prune.base import Tokens
from xutrain.methods.prune.expert import gated_output
from xutrain.methods.prune.forward import Forward
from xutrain.methods.prune.skipping import median_ratio, skipped
from xutrain.models.decoder import RMSNorm
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source


def open_forward(
    folder: Path,
    *,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    batch: int = 8,
    chunk: int = 8192,
) -> Forward:
    """A checkpoint folder as a stream of layers."""
    arch, source = Architecture.read(folder), Source(folder)
    return Forward(arch, source, compute, torch.device(device), workers or Workers(1), batch, chunk)


@torch.no_grad()
def window_losses(forward: Forward, windows: Tensor, skip: list[float] | None = None) -> Tensor:
    """Mean next-token loss of every window, nats, float64 (n,), for windows int64 (n, s).

    skip: one threshold a layer for NAEE's dynamic skipping of the second expert; None: every routed expert is used.
    """
    hidden = forward.embed(windows)
    for index in range(forward.arch.layers):
        layer = forward.load(index)
        x = forward.attend(layer, hidden)
        if forward.arch.has_experts(index):
            routing = forward.route(layer, x)
            routing = routing if skip is None else skipped(routing, skip[index])

            def output(e: int, index: int = index, x: Tensor = x, routing: object = routing) -> Tensor:
                return gated_output(forward.read(index, e), x, Tokens(*routing.routed(e)), forward.chunk)  # type: ignore[attr-defined]

            forward.add_experts(hidden, routing, output)
    read = forward.source.read
    norm = RMSNorm(forward.arch.hidden, float(forward.config.rms_norm_eps))
    norm.weight.data = read("model.norm.weight").to(hidden)
    head = read("model.embed_tokens.weight" if forward.config.tie_word_embeddings else "lm_head.weight").to(hidden)
    losses = [
        F.cross_entropy((norm(h[:-1]) @ head.T).float(), w[1:].to(h.device)).double().cpu() for h, w in zip(hidden, windows, strict=True)
    ]
    return torch.stack(losses)


@torch.no_grad()
def skip_thresholds(forward: Forward, tokens: Tensor) -> list[float]:
    """NAEE's threshold of every layer from calibration tokens (n, s): the median of second over first routing weight."""
    hidden, found = forward.embed(tokens), []
    for index in range(forward.arch.layers):
        layer = forward.load(index)
        x = forward.attend(layer, hidden)
        found.append(0.0)
        if forward.arch.has_experts(index):
            routing = forward.route(layer, x)
            found[-1] = median_ratio(routing)
            forward.add_experts(
                hidden,
                routing,
                lambda e, i=index, x=x, r=routing: gated_output(forward.read(i, e), x, Tokens(*r.routed(e)), forward.chunk),  # type: ignore[misc]
            )
    return found


def perplexity(losses: Tensor) -> float:
    """exp of the mean window loss: each window's mean loss counts equally (Wanda's code). NaN where a loss is."""
    return math.exp(min(float(losses.mean()), 700.0))  # in this order: min keeps a NaN that comes first


@torch.no_grad()
def layer_errors(dense: Forward, pruned: Forward, windows: Tensor) -> list[float]:
    """||y - y'||_F / ||y||_F of each MoE layer's expert output for tokens that were not calibrated on, inputs from the dense model.

    This is what the scores of MoE-Pruner and path target: the gated output of a layer, not the model's loss.
    """
    hidden = dense.embed(windows)
    found = []
    for index in range(dense.arch.layers):
        layer = dense.load(index)
        x = dense.attend(layer, hidden)
        if not dense.arch.has_experts(index):
            continue
        routing = dense.route(layer, x)
        wrong = torch.zeros_like(hidden)
        whole = torch.zeros_like(hidden)

        def lost(e: int, index: int = index, x: Tensor = x, routing: object = routing) -> Tensor:
            tokens = Tokens(*routing.routed(e))  # type: ignore[attr-defined]
            y = gated_output(dense.read(index, e), x, tokens, dense.chunk)
            return torch.cat([y, y - gated_output(pruned.read(index, e), x, tokens, dense.chunk)], 1)

        flat_whole, flat_wrong = whole.view(-1, dense.arch.hidden), wrong.view(-1, dense.arch.hidden)
        for start in range(0, dense.arch.experts, dense.workers.processes):
            mine = start + dense.workers.rank
            out = lost(mine) if mine < dense.arch.experts else x.new_empty(0, 2 * x.shape[1])
            for other, pair in enumerate(dense.workers.gather([out])):
                if start + other < dense.arch.experts:
                    at = routing.routed(start + other)[0]
                    flat_whole[at] += pair[:, : x.shape[1]]
                    flat_wrong[at] += pair[:, x.shape[1] :]
        hidden += whole
        found.append(float(wrong.double().norm() / whole.double().norm().clamp_min(1e-300)))
    return found


def stored_bytes(folder: Path) -> dict[str, int]:
    """What the weights take: ``dense`` on disk now, ``packed`` as a bit mask and the nonzero values, ``zeros`` and ``weights`` counted.

    Counted over the expert matrices; every other tensor counts at its size in both.
    """
    arch, source = Architecture.read(folder), Source(folder)
    names = {n for layer in range(arch.layers) for n in arch.expert_names(layer)}
    total = sum(e.bytes for e in source.entries.values())
    packed, zeros, weights = total, 0, 0
    for name in names:
        matrix = source.read(name)
        kept = int(torch.count_nonzero(matrix))
        zeros += matrix.numel() - kept
        weights += matrix.numel()
        packed += kept * matrix.element_size() + -(-matrix.numel() // 8) - matrix.numel() * matrix.element_size()
    source.close()
    return {"dense": total, "packed": packed, "zeros": zeros, "weights": weights}
