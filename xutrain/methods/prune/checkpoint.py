"""Prune a checkpoint folder into another one, layer by layer and expert by expert, from disk to disk.

    from xutrain.methods.prune.checkpoint import prune_checkpoint
    report = prune_checkpoint("Mixtral-8x7B-v0.1", "pruned", tokens, method="moe_pruner", sparsity=0.5)

Per layer: attention and router once (they are not pruned, so they are the same before and after), then each expert is
read, measured, cut, written and forgotten, and its pruned output is added to the hidden states that the next layer sees
(``propagate="dense"``: the dense output, the paper's printed Algorithm 1). In memory: the hidden states, one layer's
attention, one expert.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.errors import DataError, Issue, RecipeError, Stopped, UsageError
from xutrain.methods.prune import attention
from xutrain.methods.prune.base import Routing, WeightMethod
from xutrain.methods.prune.expert import Outcome, Row, decide, prune_expert, share_dropped, store
from xutrain.methods.prune.forward import Forward
from xutrain.methods.prune.journal import Journal, identity
from xutrain.methods.prune.load_balance import coefficient_of_variation, loads
from xutrain.methods.prune.masks import Pattern, write_masks
from xutrain.methods.prune.sums import SumsReader, SumsWriter
from xutrain.models.decoder import Layer
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source, Target

Progress = Callable[[int, int], bool]


@dataclass
class Report:
    """Outcome of a pruning: one dict per expert (see ``Row``), one per layer (router load), and whether it was already there."""

    folder: Path
    experts: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    already: bool = False
    #: share of the attention weights that is zeroed; 0 where attention is no target
    attention: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of expert weights that are zeroed (experts are of one size)."""
        return sum(r["sparsity"] for r in self.experts) / max(1, len(self.experts))

    @property
    def fallbacks(self) -> list[str]:
        return [f"layer {r['layer']} expert {r['expert']} ({r['tokens']} tokens)" for r in self.experts if r["fallback"]]

    @property
    def error(self) -> float:
        """Mean relative output error of the experts that saw tokens."""
        seen = [r["error"] for r in self.experts if r["error"] is not None]
        return sum(seen) / max(1, len(seen))


def prune_checkpoint(
    folder: str | Path,
    out: str | Path,
    tokens: Tensor,
    *,
    method: str | dict[str, Any] | WeightMethod = "moe_pruner",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    propagate: Literal["pruned", "dense"] = "pruned",
    targets: Literal["experts", "experts+attn"] = "experts",
    rescale: bool = False,
    seed: int = 0,
    batch: int = 8,
    chunk: int = 8192,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    save_sums: str | Path | None = None,
    from_sums: str | Path | None = None,
    save_masks: str | Path | None = None,
    save_every: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Prune the experts of a Mixtral, Qwen2-MoE, OLMoE or DeepSeek-V2 checkpoint (or the MLPs of a Llama).

    Args:
        folder: the dense checkpoint (config.json and safetensors); only read.
        out: new folder; same tensor names, same shards, dropped weights zero. An interrupted pruning in it is continued.
        tokens: calibration token ids, int64 (sequences, length), without padding.
        method: a name, a name with options as a mapping, or an object.
        sparsity: share of each group that goes, for ``pattern="unstructured"``; ``pattern="2:4"`` keeps two of four.
        propagate: whose output the next layer is calibrated with.
        targets: ``experts+attn`` cuts the attention matrices too, by the ungated score.
        rescale: fold one factor per output row into the pruned matrices of experts (ours).
        batch, chunk: sequences per attention pass, tokens per expert pass; they bound memory, and fix the order of sums.
        compute, device: of the calibration pass. Weights are stored in the checkpoint's dtype.
        workers: one logical worker per process; None is a single process.
        save_sums, from_sums: folder to which the calibration sums go, or from which they come (then no calibration is run).
        save_masks: folder to which the masks go, one file an expert (distillation needs them).
        save_every: layers between saved hidden states, from which an interrupted run continues.
        progress: called after each layer with (layers done, layers); returning True stops with ``Stopped``.

    Raises:
        DataError: a damaged checkpoint, tokens outside the vocabulary. UsageError: the output folder is taken.
        RecipeError: an impossible pattern or option. Failed: the disk is full.
    """
    source_folder, target_folder = Path(folder), Path(out)
    check_options(
        batch, chunk, save_every, compute,
        propagate=(propagate, ("pruned", "dense")), targets=(targets, ("experts", "experts+attn")),
    )  # fmt: skip
    if from_sums and (rescale or targets != "experts" or save_sums):
        name = "rescale" if rescale else "save_sums" if save_sums else "targets"
        raise RecipeError(Issue("from_sums", f"no tokens are seen, as {name} needs", has_value=False, hint=f"leave {name} out"))
    check_folders(source_folder, target_folder)
    arch, source = Architecture.read(source_folder), Source(source_folder)
    how = Pattern.parse(pattern, sparsity)
    for role, columns in (("gate", arch.hidden), ("down", arch.ffn)):
        how.check(columns, arch.expert_name(arch.pruned_layers[0], 0, role))
    part = method if isinstance(method, WeightMethod) else weight_method(method)
    check_tokens(tokens, arch)
    if targets != "experts" and part.options.name == "sparsegpt":
        raise RecipeError(Issue("targets", "method sparsegpt prunes experts only", targets, "wanda, moe_pruner, path prune attention too"))
    known = {"method": part.options.model_dump(), "pattern": how.name, "sparsity": how.sparsity, "propagate": propagate, "rescale": rescale}
    known |= {"seed": seed, "batch": batch, "chunk": chunk, "compute": str(compute), "from_sums": str(from_sums) if from_sums else None}
    known |= {"targets": targets} if targets != "experts" else {}
    known |= {key: True for key, folder in (("save_sums", save_sums), ("save_masks", save_masks)) if folder}
    journal = Journal(target_folder, identity(source, tokens, known))
    if (done := journal.finished()) is not None:
        return Report(target_folder, done["experts"], done["layers"], already=True, attention=done.get("attention", 0.0))
    forward = Forward(arch, source, compute, torch.device(device), workers or Workers(1), batch, chunk)
    run = _Run(forward, Target(target_folder, source.headers), part, how, journal)
    run.propagate, run.rescale, run.seed = propagate, rescale, seed
    run.save_every, run.progress = save_every, progress
    run.attention = attention.names(arch, source) if targets == "experts+attn" else set()
    run.masks = Path(save_masks) if save_masks else None
    run.writer = SumsWriter(Path(save_sums), arch, part, known) if save_sums else None
    run.reader = SumsReader(Path(from_sums), arch, part) if from_sums else None
    try:
        with torch.no_grad():
            return run.all(tokens, known)
    finally:
        source.close()
        run.target.close()


def weight_method(method: str | dict[str, Any]) -> WeightMethod:
    """A weight-pruning method by name or mapping. Raises RecipeError for an unknown name or option."""
    from xutrain.recipe.resolve import options

    values = {"name": method} if isinstance(method, str) else dict(method)
    part, chosen = options("method", str(values.pop("name", "")), values, "prune")
    built = part(chosen)
    if not isinstance(built, WeightMethod):
        raise UsageError(Issue("method", "prunes whole experts; use drop_experts", values, "xutrain.methods.prune.drop.drop_experts"))
    return built


def check_folders(source: Path, out: Path) -> None:
    """Raises UsageError when the output is the input, inside it, or around it."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        hint = "choose a folder beside it; the input checkpoint is never written to"
        raise UsageError(Issue("out", "the output folder is the input checkpoint, or lies inside or around it", str(out), hint))


def check_options(batch: int, chunk: int, save_every: int, compute: torch.dtype, **choices: tuple[str, tuple[str, ...]]) -> None:
    """Raises RecipeError for an argument that cannot be; ``choices``: name -> (given, allowed)."""
    for name, value in (("batch", batch), ("chunk", chunk), ("save_every", save_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(Issue(name, "must be a positive integer", value))
    if compute not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise RecipeError(Issue("compute", "must be a floating-point dtype of torch", compute, "torch.float32, or torch.bfloat16"))
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise RecipeError(Issue(name, f"must be {' or '.join(allowed)}", given))


def check_tokens(tokens: Tensor, arch: Architecture) -> None:
    """Raises DataError for calibration tokens that cannot be."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        found = f"{tokens.dtype} tensor" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise DataError(Issue("calibration", "token ids must be a tensor of integers, (sequences, length)", found))
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(Issue("calibration", "needs at least one sequence of two tokens", tuple(tokens.shape)))
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= arch.vocab:
        hint = "were the tokens made with this model's tokenizer?"
        raise DataError(Issue("calibration", f"token ids must lie in 0..{arch.vocab - 1}", (low, high), hint))


class _Run:
    """State of one pruning on one process."""

    propagate: str
    rescale: bool
    seed: int
    save_every: int
    attention: set[str]
    masks: Path | None
    progress: Progress | None
    writer: SumsWriter | None
    reader: SumsReader | None

    def __init__(self, forward: Forward, target: Target, method: WeightMethod, pattern: Pattern, journal: Journal) -> None:
        self.forward, self.arch, self.source, self.workers = forward, forward.arch, forward.source, forward.workers
        self.target, self.method, self.pattern, self.journal = target, method, pattern, journal

    @property
    def main(self) -> bool:
        return self.workers.rank == 0

    def all(self, tokens: Tensor, known: dict[str, Any]) -> Report:
        self.journal.open()
        self.workers.barrier()  # every process has looked at the folder before one of them fills it
        if self.main:
            self.journal.start()
            self.target.create()
        self.workers.barrier()
        self.copy_untouched()
        first, hidden = self.journal.resume_at()
        if self.reader is not None:
            first, hidden = len(self.journal.layers), torch.empty(0)
        hidden = self.forward.embed(tokens) if hidden is None else hidden.to(self.forward.device)
        for index in range(first, self.arch.layers):
            rows, load, cut = self.layer(index, hidden)
            self.target.sync()
            self.workers.barrier()
            if self.main:
                self.journal.add({"layer": index, "experts": [r.as_dict() for r in rows], "load": load, "attention": cut})
                if self.reader is None and (index + 1) % self.save_every == 0 and index + 1 < self.arch.layers:
                    self.journal.save_hidden(index + 1, hidden)
            stop = self.progress is not None and self.progress(index + 1, self.arch.layers)
            if self.workers.any(stop) and index + 1 < self.arch.layers:
                raise Stopped(Issue(str(self.journal.out), f"stopped after layer {index + 1} of {self.arch.layers}", has_value=False))
        return self.finish(known)

    def copy_untouched(self) -> None:
        """Everything but expert matrices, bit by bit; shards are divided over the processes."""
        touched = self.attention.union(*(self.arch.expert_names(layer) for layer in range(self.arch.layers)))
        for i, file in enumerate(sorted(self.target.headers)):
            if i % self.workers.processes == self.workers.rank and not self.journal.has("copied", file):
                for name, entry in self.source.entries.items():
                    if entry.file == file and name not in touched:
                        self.target.copy(self.source, name)
                self.target.sync()
                if self.main:
                    self.journal.add({"copied": file})

    def layer(self, index: int, hidden: Tensor) -> tuple[list[Row], dict[str, Any], list[int]]:
        """Prune one layer and move ``hidden`` (n, s, d) through it, in place; rows, router load, (zeros, weights) of attention."""
        if self.reader is not None:
            return self.from_sums(index), {}, [0, 0]
        layer = self.forward.load(index)
        cut = self.attend_pruned(layer, hidden) if self.attention else [0, 0]
        x = self.forward.attend(layer, hidden)
        if not self.arch.has_experts(index):
            return [], {}, cut
        routing = self.forward.route(layer, x)
        rows: list[Row] = []

        def pruned(e: int) -> Tensor:
            outcome = self.expert(index, e, x, routing)
            rows.append(outcome.row)
            return outcome.output

        self.forward.add_experts(hidden, routing, pruned)
        if self.writer is not None:
            self.writer.layer(index, self.workers)
        counts = loads(routing)
        cv = {f"{k}_cv": coefficient_of_variation(v) for k, v in counts.items()}
        return self.everyone(rows), {"layer": index, **{k: v.tolist() for k, v in counts.items()}, **cv}, cut

    def attend_pruned(self, layer: Layer, hidden: Tensor) -> list[int]:
        """Cut the attention of a layer, and write it."""
        key = Key(self.seed, "prune/attention", layer.index)
        written = attention.prune_attention(self.forward, layer, hidden, self.method, self.pattern, key)
        if self.main:
            for name, weight in written.items():
                self.target.write(name, weight)
        return [sum(w.numel() - int(torch.count_nonzero(w)) for w in written.values()), sum(w.numel() for w in written.values())]

    def everyone(self, rows: list[Row]) -> list[Row]:
        """The rows of all processes, by expert."""
        blocks = self.workers.objects([[r.as_dict() for r in rows]])
        return sorted((Row(**r) for block in blocks for r in block), key=lambda r: r.expert)

    def expert(self, layer: int, e: int, x: Tensor, routing: Routing) -> Outcome:
        stored = self.forward.stored(layer, e)
        outcome = prune_expert(
            self.method,
            self.forward.computing(stored),
            stored,
            x,
            routing,
            (layer, e),
            self.pattern,
            Key(self.seed, "prune", layer, e),
            rescale=self.rescale,
            propagate=self.propagate,
            chunk=self.forward.chunk,
            name=self.arch.expert_name(layer, e, "gate").rsplit(".", 2)[0],
        )
        self.write(layer, e, outcome.matrices, outcome.masks)
        if self.writer is not None:
            self.writer.add(e, outcome.sums, outcome.row.tokens, outcome.counted)
        return outcome

    def from_sums(self, layer: int) -> list[Row]:
        """Cut a layer again from cached sums: no forward pass, no hidden states."""
        assert self.reader is not None
        rows: list[Row] = []
        for e in range(self.arch.experts if self.arch.has_experts(layer) else 0):
            if e % self.workers.processes == self.workers.rank:
                stored = self.forward.stored(layer, e)
                expert = self.forward.computing(stored)
                sums, tokens, counted = self.reader.expert(layer, e)
                on = {k: v.to(self.forward.device) for k, v in sums.items()}  # in their own dtype, as they were summed
                cut, fallback = decide(self.method, expert, on, counted, self.pattern, Key(self.seed, "prune", layer, e))
                self.write(layer, e, store(cut, stored), cut.masks)
                rows.append(Row(layer, e, tokens, None, fallback, share_dropped(cut.masks), None))
        return self.everyone(rows)

    def write(self, layer: int, e: int, matrices: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        if self.masks is not None:
            write_masks(self.masks, layer, e, masks)
        for role, matrix in matrices.items():
            self.target.write(self.arch.expert_name(layer, e, role), matrix)

    def finish(self, known: dict[str, Any]) -> Report:
        self.workers.barrier()
        experts = [r for line in self.journal.layers for r in line["experts"]] if self.main else []
        layers = [line["load"] for line in self.journal.layers if line["load"]] if self.main else []
        zeros, weights = (sum(line.get("attention", [0, 0])[i] for line in self.journal.layers) for i in (0, 1))
        experts, layers, share = self.workers.objects([(experts, layers, zeros / max(1, weights))])[0]
        if self.main:
            copy_companions(self.source.folder, self.target.folder)
            self.target.write_index()
            if self.writer is not None:
                self.writer.finish()
            self.journal.finish({**known, "experts": experts, "layers": layers, "attention": share})
        self.workers.barrier()
        return Report(self.target.folder, experts, layers, attention=share)


def copy_companions(source: Path, out: Path) -> None:
    """Config, tokenizer and generation files: everything small that is not a weight file; config.json last."""
    for file in sorted(source.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not file.name.startswith(".") and file.name != "pruning.json":
            shutil.copyfile(file, out / file.name)
