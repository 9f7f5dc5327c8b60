"""Drop whole experts of every layer: the checkpoint shrinks, the router loses their rows, the config says how many are left.

    from xutrain.methods.prune.drop import drop_experts
    report = drop_experts("Mixtral-8x7B-v0.1", "smaller", tokens, method={"name": "reap", "keep": 6})

Streamed and journalled like the weight pruning. A method chooses the experts that stay from one layer's calibration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.workers import Workers
from xutrain.errors import DataError, Issue, RecipeError, Stopped
from xutrain.methods.prune.base import ROLES, Routing, Tokens
from xutrain.methods.prune.checkpoint import Progress, Report, check_folders, check_options, check_tokens, copy_companions
from xutrain.methods.prune.expert import gated_output
from xutrain.methods.prune.forward import Forward
from xutrain.methods.prune.journal import Journal, identity
from xutrain.methods.prune.load_balance import coefficient_of_variation, loads
from xutrain.models.decoder import Layer
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source, Target, header_of, write_aside
from xutrain.registry import Named


@dataclass
class LayerView:
    """What a method may look at: the forward stream, the layer, its experts' input x (T, d) and the router's decision."""

    forward: Forward
    layer: Layer
    index: int
    x: Tensor
    routing: Routing

    def per_expert(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A number for every expert from its routed tokens: value(g (t,), E(x) (t, d)); float64 (n,)."""
        workers, mine = self.forward.workers, {}
        for e in range(workers.rank, self.forward.arch.experts, workers.processes):
            index, weight = self.routing.routed(e)
            ones = Tokens(index, torch.ones_like(weight))
            out = gated_output(self.forward.read(self.index, e), self.x, ones, self.forward.chunk)
            mine[e] = number = float(value(weight.double(), out.double()))
            if not math.isfinite(number):
                name = self.forward.arch.expert_name(self.index, e, "gate").rsplit(".", 2)[0]
                raise DataError(Issue(name, "outputs are not finite during calibration", has_value=False))
        found = {e: v for block in workers.objects([mine]) for e, v in block.items()}
        return torch.tensor([found[e] for e in sorted(found)], dtype=torch.float64)


class ExpertMethod:
    """A method that keeps ``keep`` experts of every layer."""

    class Options(Named):
        keep: int = Field(6, ge=1, description="experts of each layer that stay; at least as many as the router uses per token")

    kind: ClassVar[str] = "experts"

    def __init__(self, options: Named) -> None:
        self.options = options

    @property
    def keep(self) -> int:
        return int(self.options.keep)  # type: ignore[attr-defined]

    def choose(self, view: LayerView) -> list[int]:
        """The experts that stay, in rising order."""
        return largest(self.importance(view), self.keep)

    def importance(self, view: LayerView) -> Tensor:
        """A number for every expert; the largest stay."""
        raise NotImplementedError


def largest(importance: Tensor, keep: int) -> list[int]:
    """Indices of the ``keep`` largest in rising order; of equal ones, the first stay."""
    return sorted(torch.argsort(importance, descending=True, stable=True)[:keep].tolist())


def drop_experts(
    folder: str | Path,
    out: str | Path,
    tokens: Tensor,
    *,
    method: dict[str, Any] | ExpertMethod,
    propagate: Literal["pruned", "dense"] = "pruned",
    batch: int = 8,
    chunk: int = 8192,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    save_every: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint with fewer experts per layer. Arguments as ``prune_checkpoint``.

    Raises:
        RecipeError: fewer experts than the router uses per token, or a model without experts or with expert groups.
    """
    source_folder, target_folder = Path(folder), Path(out)
    check_options(batch, chunk, save_every, compute, propagate=(propagate, ("pruned", "dense")))
    check_folders(source_folder, target_folder)
    arch, source = Architecture.read(source_folder), Source(source_folder)
    part = method if isinstance(method, ExpertMethod) else _expert_method(method)
    _check(arch, part.keep)
    check_tokens(tokens, arch)
    known = {"method": part.options.model_dump(), "propagate": propagate, "batch": batch, "chunk": chunk, "compute": str(compute)}
    journal = Journal(target_folder, identity(source, tokens, known))
    if (done := journal.finished()) is not None:
        return Report(target_folder, done["experts"], done["layers"], already=True)
    forward = Forward(arch, source, compute, torch.device(device), workers or Workers(1), batch, chunk)
    target = Target(target_folder, smaller_headers(arch, source, part.keep))
    try:
        with torch.no_grad():
            return _run(forward, target, part, journal, tokens, known, propagate, save_every, progress)
    finally:
        source.close()
        target.close()


def _expert_method(method: dict[str, Any]) -> ExpertMethod:
    from xutrain.recipe.resolve import options

    values = dict(method)
    part, chosen = options("method", str(values.pop("name", "")), values, "prune")
    built = part(chosen)
    if not isinstance(built, ExpertMethod):
        raise RecipeError(Issue("method.name", "prunes weights, not experts; use prune_checkpoint", chosen.name))
    return built


def _check(arch: Architecture, keep: int) -> None:
    kind = arch.family.model_type
    if arch.dense or arch.config.get("topk_method") == "group_limited_greedy":
        why = "has no experts to drop" if arch.dense else "routes over groups of experts of equal size, which dropping would break"
        raise RecipeError(Issue("method.name", f"{kind} {why}", has_value=False, hint="use a method that prunes weights"))
    if not arch.top_k <= keep <= arch.experts:
        raise RecipeError(Issue("method.keep", f"must lie between the {arch.top_k} experts per token and all {arch.experts}", keep))


def smaller_headers(arch: Architecture, source: Source, keep: int) -> dict[str, bytes]:
    """Shard headers of a checkpoint with ``keep`` experts a layer; expert i stays in the shard where expert i was."""
    gone = {n for layer in range(arch.layers) for e in range(keep, arch.experts) for n in _names(arch, layer, e)}
    routers = {arch.router_name(layer) for layer in arch.pruned_layers}
    files: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {file: {} for file in source.headers}
    for name, e in source.entries.items():
        if name not in gone:
            files[e.file][name] = (e.dtype, (keep, *e.shape[1:]) if name in routers else e.shape)
    return {file: header_of(tensors) for file, tensors in files.items() if tensors}


def _names(arch: Architecture, layer: int, expert: int) -> list[str]:
    return [arch.expert_name(layer, expert, r) for r in ROLES] if arch.has_experts(layer) else []


def _run(
    forward: Forward,
    target: Target,
    method: ExpertMethod,
    journal: Journal,
    tokens: Tensor,
    known: dict[str, Any],
    propagate: str,
    save_every: int,
    progress: Progress | None,
) -> Report:
    arch, source, workers = forward.arch, forward.source, forward.workers
    journal.open()
    workers.barrier()
    if workers.rank == 0:
        journal.start()
        target.create()
    workers.barrier()
    touched = {n for layer in range(arch.layers) for n in arch.expert_names(layer)} | {arch.router_name(i) for i in arch.pruned_layers}
    if workers.rank == 0 and not journal.has("copied", "all"):
        for name in source.entries:
            if name not in touched:
                target.copy(source, name)
        target.sync()
        journal.add({"copied": "all"})
    first, hidden = journal.resume_at()
    hidden = forward.embed(tokens) if hidden is None else hidden.to(forward.device)
    for index in range(first, arch.layers):
        load = _layer(forward, target, method, index, hidden, propagate)
        target.sync()
        workers.barrier()
        if workers.rank == 0:
            journal.add({"layer": index, "experts": [], "load": load})
            if (index + 1) % save_every == 0 and index + 1 < arch.layers:
                journal.save_hidden(index + 1, hidden)
        stop = progress is not None and progress(index + 1, arch.layers)
        if workers.any(stop) and index + 1 < arch.layers:
            raise Stopped(Issue(str(journal.out), f"stopped after layer {index + 1} of {arch.layers}", has_value=False))
    layers = workers.objects([[line["load"] for line in journal.layers if line["load"]] if workers.rank == 0 else []])[0]
    if workers.rank == 0:
        copy_companions(source.folder, target.folder)
        file = target.folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        own = str(arch.family.experts)  # written also where the config leaves it to the family's default
        counts = {k: method.keep for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config or k == own}
        write_aside(file, (json.dumps({**config, **counts}, indent=2) + "\n").encode())
        target.write_index()
        journal.finish({**known, "experts": [], "layers": layers})
    workers.barrier()
    return Report(target.folder, [], layers)


def _layer(forward: Forward, target: Target, method: ExpertMethod, index: int, hidden: Tensor, propagate: str) -> dict[str, Any]:
    """Choose, write and move on by one layer."""
    arch, source, workers = forward.arch, forward.source, forward.workers
    layer = forward.load(index)
    x = forward.attend(layer, hidden)
    if not arch.has_experts(index):
        return {}
    routing = forward.route(layer, x)
    kept = method.choose(LayerView(forward, layer, index, x, routing))
    if workers.rank == 0:
        for new, old in enumerate(kept):
            for role in ROLES:
                target.copy(source, arch.expert_name(index, old, role), arch.expert_name(index, new, role))
        target.write(arch.router_name(index), source.read(arch.router_name(index))[kept])
    after = routing if propagate == "dense" else forward.route(layer, x, kept)

    def output(e: int) -> Tensor:
        return gated_output(forward.read(index, e), x, Tokens(*after.routed(e)), forward.chunk)

    forward.add_experts(hidden, after, output, None if propagate == "dense" else kept)
    counts = loads(routing)
    cv = {f"{k}_cv": coefficient_of_variation(v) for k, v in counts.items()}
    return {"layer": index, "kept": kept, **{k: v.tolist() for k, v in counts.items()}, **cv}
