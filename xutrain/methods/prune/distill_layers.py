"""Expert-wise distillation as a stream from disk to disk: the layer-local reading of arXiv:2410.12013, eq. 10.

    for every expert:  min over kept weights of  mean_t || E_dense(x_t) - E_pruned(x_t) ||^2 / d,   x_t the dense model's own input

Both experts see the dense model's hidden states, so no gradient crosses a layer: L_expert falls apart into one small problem
per expert, and L_CE has no part in it. One layer's attention and one expert (dense and pruned, with AdamW's moments) are in
memory, as in the pruning; a kill and a rerun give the same bytes, for any number of processes. Masks are kept. Limit: an
expert whose error does not fall keeps its pruned weights, so nothing pruned means nothing changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.errors import Issue, Stopped
from xutrain.methods.prune.base import ROLES, Expert, Tokens
from xutrain.methods.prune.checkpoint import Progress, check_folders, check_tokens, copy_companions
from xutrain.methods.prune.distill import rate
from xutrain.methods.prune.expert import gated_output
from xutrain.methods.prune.forward import Forward
from xutrain.methods.prune.journal import Journal, identity
from xutrain.methods.prune.masks import read_masks
from xutrain.models.moe import Architecture
from xutrain.models.shards import DTYPES, Source, Target


def distil_layers(
    dense: str | Path,
    pruned: str | Path,
    masks: str | Path,
    out: str | Path,
    tokens: Tensor,
    options: Any,
    *,
    seed: int = 0,
    batch: int = 8,
    chunk: int = 8192,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    save_every: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Distil the experts of ``pruned`` from those of ``dense`` into the new folder ``out``.

    Args:
        masks: folder that the pruning wrote with ``save_masks``. tokens: text to distil on, int64 (sequences, length).
        options: the recipe's section ``distill`` (steps, batch_size, length, lr, warmup, weight_decay, clip_norm).
        The others as in ``prune_checkpoint``.

    Returns:
        One row an expert: layer, expert, tokens, and the mean squared error before and after.

    Raises:
        DataError: a damaged checkpoint. UsageError: the output folder is taken. Stopped: asked to stop, after a layer.
    """
    target_folder = Path(out)
    for folder in (Path(dense), Path(pruned)):
        check_folders(folder, target_folder)
    arch = Architecture.read(Path(dense))
    teacher, student = Source(Path(dense)), Source(Path(pruned))
    check_tokens(tokens, arch)
    chosen = options.model_dump() if hasattr(options, "model_dump") else dict(vars(options))
    known = {"distill": chosen, "teacher": identity(teacher, tokens, {}), "seed": seed, "batch": batch, "chunk": chunk}
    journal = Journal(target_folder, identity(student, tokens, {**known, "compute": str(compute)}))
    if (done := journal.finished()) is not None:
        return list(done["experts"])
    forward = Forward(arch, teacher, compute, torch.device(device), workers or Workers(1), batch, chunk)
    target = Target(target_folder, student.headers)
    run = _Run(forward, student, target, journal, Path(masks), options, seed)
    try:
        with torch.no_grad():
            return run.all(tokens, save_every, progress)
    finally:
        for opened in (teacher, student, target):
            opened.close()


class _Run:
    """State of one distillation on one process."""

    def __init__(self, forward: Forward, student: Source, target: Target, journal: Journal, masks: Path, options: Any, seed: int) -> None:
        self.forward, self.student, self.target, self.journal = forward, student, target, journal
        self.masks, self.options, self.seed = masks, options, seed
        self.arch, self.workers = forward.arch, forward.workers

    def all(self, tokens: Tensor, save_every: int, progress: Progress | None) -> list[dict[str, Any]]:
        main = self.workers.rank == 0
        self.journal.open()
        self.workers.barrier()
        if main:
            self.journal.start()
            self.target.create()
            touched = {n for layer in range(self.arch.layers) for n in self.arch.expert_names(layer)}
            for name in self.student.entries:
                if name not in touched:
                    self.target.copy(self.student, name)
        first, hidden = self.journal.resume_at()
        hidden = self.forward.embed(tokens) if hidden is None else hidden.to(self.forward.device)
        for index in range(first, self.arch.layers):
            rows = self.layer(index, hidden)
            self.target.sync()
            self.workers.barrier()
            if main:
                self.journal.add({"layer": index, "experts": rows})
                if (index + 1) % save_every == 0 and index + 1 < self.arch.layers:
                    self.journal.save_hidden(index + 1, hidden)
            stop = progress is not None and progress(index + 1, self.arch.layers)
            if self.workers.any(stop) and index + 1 < self.arch.layers:
                what = f"stopped after distilling layer {index + 1} of {self.arch.layers}"
                raise Stopped(Issue(str(self.journal.out), what, has_value=False))
        found = [r for line in self.journal.layers for r in line["experts"]] if main else []
        found = self.workers.objects([found])[0]
        if main:
            copy_companions(self.student.folder, self.target.folder)
            self.target.write_index()
            self.journal.finish({"experts": found})
        self.workers.barrier()
        return found

    def layer(self, index: int, hidden: Tensor) -> list[dict[str, Any]]:
        """Distil one layer's experts, and move the dense model's ``hidden`` (n, s, d) through it, in place."""
        layer = self.forward.load(index)
        x = self.forward.attend(layer, hidden)
        if not self.arch.has_experts(index):
            return []
        routing = self.forward.route(layer, x)
        rows: list[dict[str, Any]] = []

        def expert(e: int) -> Tensor:
            tokens, dense = Tokens(*routing.routed(e)), self.forward.stored(index, e)
            rows.append(self.expert(index, e, dense, x[tokens.index]))
            return gated_output(self.forward.computing(dense), x, tokens, self.forward.chunk)

        self.forward.add_experts(hidden, routing, expert)
        return sorted((row for block in self.workers.objects([rows]) for row in block), key=lambda row: row["expert"])

    def expert(self, layer: int, e: int, dense: Expert, x: Tensor) -> dict[str, Any]:
        """Distil and write one expert on its tokens x (t, d); ``dense`` as stored. Both experts compute in float32 at least."""
        names = {role: self.arch.expert_name(layer, e, role) for role in ROLES}
        stored = {role: self.student.read(name) for role, name in names.items()}
        masks = read_masks(self.masks, layer, e, {role: m.shape[1] for role, m in stored.items()})
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        dense, start = (Expert(*(one[role].to(x) for role in ROLES)) for one in (vars(dense), stored))
        before = error(dense, start, x, self.forward.chunk)
        row: dict[str, Any] = {"layer": layer, "expert": e, "tokens": len(x), "before": before, "after": before}
        if len(x) and before > 0:
            size = max(1, self.options.batch_size * self.options.length * self.arch.top_k // self.arch.experts)
            on = {role: mask.to(x.device) for role, mask in masks.items()}
            trained = train(dense, start, on, x, self.options, size, Key(self.seed, "distill/layers", layer, e).generator())
            rounded = {role: trained.matrix(role).to("cpu", DTYPES[self.student.entry(names[role]).dtype]) for role in ROLES}
            row["after"] = error(dense, Expert(*(rounded[role].to(x) for role in ROLES)), x, self.forward.chunk)
            if row["after"] < before:
                stored = rounded
            else:
                row["after"] = before
        for role, name in names.items():
            self.target.write(name, stored[role])
        return row


def error(dense: Expert, pruned: Expert, x: Tensor, chunk: int) -> float:
    """Mean over tokens and outputs of (E_dense(x) - E_pruned(x))^2; 0 without tokens."""
    total = 0.0
    for part in x.split(chunk) if len(x) else ():
        total += float((dense(part) - pruned(part)).double().square().sum())
    return total / max(1, x.numel())


def train(dense: Expert, start: Expert, masks: dict[str, Tensor], x: Tensor, options: Any, size: int, generator: torch.Generator) -> Expert:
    """AdamW on the kept weights; ``size`` tokens a step, drawn with ``generator``. Dropped weights stay zero."""
    weights = {role: start.matrix(role).clone().requires_grad_() for role in ROLES}
    optimizer = torch.optim.AdamW(weights.values(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(options, step)
        z = x[torch.randint(len(x), (size,), generator=generator).to(x.device)]
        target = dense(z)
        with torch.enable_grad():
            F.mse_loss(Expert(*weights.values())(z), target).backward()
        for role, weight in weights.items():
            assert weight.grad is not None
            weight.grad.mul_(masks[role])
        torch.nn.utils.clip_grad_norm_(list(weights.values()), options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for role, weight in weights.items():
            weight.mul_(masks[role])
    return Expert(*(w.detach() for w in weights.values()))
