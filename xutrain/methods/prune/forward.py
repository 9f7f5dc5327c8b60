"""A model moved forward layer by layer from its files: attention of one layer and one expert are in memory, nothing else.

Batches of attention and experts are divided over processes, their results gathered in a fixed order; so hidden states are
equal, bit for bit, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xutrain.engine.workers import Workers
from xutrain.errors import DataError, Issue
from xutrain.methods.prune.base import ROLES, Expert, Routing
from xutrain.models import fits
from xutrain.models.decoder import Layer, Rotary, attention_config, load_layer, route
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source


def finite(tensor: Tensor, name: str, what: str) -> Tensor:
    """The tensor itself. Raises DataError when one of its numbers is not finite: their sum is not, either."""
    if not bool(torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))):
        raise DataError(Issue(name, what, has_value=False, hint="a damaged checkpoint, or numbers beyond the compute dtype"))
    return tensor


class Forward:
    """The layers of a checkpoint as a stream.

    batch: sequences per attention pass; chunk: tokens per expert pass. Both bound memory and fix the order of sums.
    """

    def __init__(
        self, arch: Architecture, source: Source, compute: torch.dtype, device: torch.device, workers: Workers, batch: int, chunk: int
    ) -> None:
        self.arch, self.source, self.workers = arch, source, workers
        self.compute, self.device, self.batch, self.chunk = compute, device, batch, chunk
        self.config = attention_config(arch)
        fits.check(arch, self.config, source)
        self.rotary = Rotary(arch, self.config, device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states (n, s, d) of tokens (n, s)."""
        return self.source.read("model.embed_tokens.weight")[tokens].to(self.device, self.compute)

    def load(self, index: int) -> Layer:
        return load_layer(self.arch, self.source, index, self.config, self.compute, self.device)

    def stored(self, layer: int, expert: int) -> Expert:
        """One expert as the checkpoint has it. Raises DataError for a weight that is not finite."""
        names = [self.arch.expert_name(layer, expert, r) for r in ROLES]
        return Expert(*(finite(self.source.read(name), name, "has a weight that is not finite") for name in names))

    def computing(self, stored: Expert) -> Expert:
        """The same in the dtype and on the device of the forward pass."""
        return Expert(*(stored.matrix(r).to(self.device, self.compute) for r in ROLES))

    def read(self, layer: int, expert: int) -> Expert:
        return self.computing(self.stored(layer, expert))

    def attend(self, layer: Layer, hidden: Tensor) -> Tensor:
        """Attention, residual, and what every token gets, in place; returns the experts' input (n s, d).

        Raises DataError for hidden states that are not finite, naming the layer.
        """
        starts = list(range(0, len(hidden), self.batch))
        share = -(-len(starts) // self.workers.processes)
        mine = starts[self.workers.rank * share : (self.workers.rank + 1) * share]
        x = torch.empty_like(hidden)
        for start in mine:
            at = slice(start, start + self.batch)
            h = layer.attend(hidden[at], self.rotary(hidden))
            x[at] = layer.post_attention_layernorm(h)
            if layer.sparse:
                always = layer.block.always(x[at])
                h = h if always is None else h + always
            elif not self.arch.dense:
                h = h + layer.mlp(x[at])
            hidden[at] = h
        if self.workers.processes > 1:
            span = slice(mine[0], mine[-1] + self.batch) if mine else slice(0, 0)
            for whole in (hidden, x):
                whole.copy_(torch.cat(self.workers.gather([whole[span].clone()])))
        return finite(x, self.arch.layer_prefix(layer.index).rstrip("."), "hidden states are not finite").view(-1, self.arch.hidden)

    def route(self, layer: Layer, x: Tensor, allowed: list[int] | None = None) -> Routing:
        """The router's decision for x (T, d); ``allowed``: the router as if only these experts existed (NAEE)."""
        if self.arch.dense:  # one expert that every token reaches
            ones = x.new_ones(len(x), 1, dtype=torch.float32)
            return Routing(torch.zeros_like(ones, dtype=torch.int64), ones, ones)
        parts = []
        for piece in x.split(self.chunk):
            logits = layer.block.logits(piece)
            if allowed is not None:
                others = [e for e in range(self.arch.experts) if e not in allowed]
                logits[:, others] = -torch.inf
            parts.append(route(self.arch, logits))
        return Routing(*(torch.cat(p) for p in zip(*parts, strict=True)))

    def add_experts(self, hidden: Tensor, routing: Routing, output: Callable[[int], Tensor], experts: list[int] | None = None) -> None:
        """Add every expert's gated output for its routed tokens to ``hidden``, in expert order.

        ``output(e)`` is called for the experts that this process computes, and gives (tokens of e, d).
        """
        flat = hidden.view(-1, self.arch.hidden)
        todo = list(range(self.arch.experts)) if experts is None else experts
        step = self.workers.processes
        for at in range(0, len(todo), step):
            turn = todo[at : at + step]
            mine = output(turn[self.workers.rank]) if self.workers.rank < len(turn) else flat.new_empty(0, flat.shape[1])
            for expert, out in zip(turn, self.workers.gather([mine]), strict=False):
                flat[routing.routed(expert)[0]] += out
