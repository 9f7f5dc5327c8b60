"""`xutrain prune`: fetch or train the dense model, prune it layer by layer, distil it if asked, measure before and after."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xutrain import registry
from xutrain.data import windows
from xutrain.engine.checkpoint import Checkpoints
from xutrain.engine.context import Context
from xutrain.engine.record import Record, write_json
from xutrain.engine.rng import Key
from xutrain.engine.stop import Stop
from xutrain.errors import DataError, Diverged, Issue, RecipeError, Stopped
from xutrain.launch.plan import Forecast
from xutrain.loops import embedded_mixtral
from xutrain.methods.prune import cost, zero_shot
from xutrain.methods.prune.checkpoint import Report, copy_companions, prune_checkpoint
from xutrain.methods.prune.distill import Distiller, masks_of, rate
from xutrain.methods.prune.distill_layers import distil_layers
from xutrain.methods.prune.drop import ExpertMethod, drop_experts
from xutrain.methods.prune.measure import layer_errors, open_forward, perplexity, skip_thresholds, stored_bytes, window_losses
from xutrain.models.decoder import Decoder, attention_config
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source, Target


def run(recipe: Any, ctx: Context, record: Record) -> dict[str, float]:
    """Prune and measure; returns the final metrics.

    The pruned checkpoint is the folder ``pruned`` of the run folder (``distilled`` after distillation).

    Raises:
        DataError: a missing or damaged checkpoint or text. Stopped: asked to stop, at a layer or step boundary.
    """
    stop = Stop(record.folder, ctx, every=1)
    dense = find_dense(recipe, ctx, record, stop)
    arch = Architecture.read(dense)
    check(recipe, arch)
    texts = {name: text_windows(recipe, source, dense) for name, source in recipe.evaluation.texts.items()}
    tokens, study = calibration(recipe, dense), study_tokens(recipe, dense)

    report = prune(recipe, ctx, record, stop, dense, tokens)
    final = record.folder / "pruned"
    metrics = {"sparsity": report.sparsity, "fallbacks": float(len(report.fallbacks))}
    metrics |= {"expert_error": report.error} if any(r["error"] is not None for r in report.experts) else {}
    shape = cost.Shape.of(arch)
    zeros = report.sparsity * shape.expert * shape.experts + report.attention * shape.attention * arch.layers
    metrics["model_sparsity"] = zeros / shape.total
    metrics |= {"attention_sparsity": report.attention} if recipe.targets != "experts" else {}
    metrics |= {f"load_{kind}_cv": mean([row[f"{kind}_cv"] for row in report.layers]) for kind in ("top1", "topk")} if report.layers else {}
    metrics |= measured(recipe, ctx, record, "dense", dense, texts, "_dense")
    metrics |= measured(recipe, ctx, record, "pruned", final, texts, "_pruned" if recipe.distill else "")
    if recipe.evaluation.local_error and len(report.experts) == arch.experts * len(arch.pruned_layers):
        metrics["local_error"] = local_error(recipe, ctx, record, dense, final, texts)
    if recipe.evaluation.skipping:
        metrics["perplexity_skipping"] = skipping(recipe, ctx, final, tokens, texts)
    if study is not None:
        final = (distil_streamed if recipe.distill.mode == "layers" else distil)(recipe, ctx, record, stop, dense, final, study)
        metrics |= measured(recipe, ctx, record, "distilled", final, texts, "")
    more = 0 if recipe.distill is None else arch.layers if recipe.distill.mode == "layers" else recipe.distill.steps
    record.forget(*metrics)  # of a start that was killed just after
    record.log(arch.layers + more, metrics, split="test")
    write_tables(record, report, dense, final, metrics)
    return metrics


def check(recipe: Any, arch: Architecture) -> None:
    """What would otherwise be found out after hours of pruning. Raises RecipeError or DataError."""
    e, d = recipe.evaluation, recipe.distill
    if e.skipping and arch.top_k != 2:
        raise RecipeError(Issue("evaluation.skipping", f"is for models with two experts a token; this one has {arch.top_k}", True))
    window = getattr(attention_config(arch), "sliding_window", None)
    lengths = {"calibration.length": recipe.calibration.length, "evaluation.length": e.length, "distill.length": d.length if d else 0}
    for key, length in lengths.items():
        if window and length > window:
            raise DataError(Issue(key, f"exceeds the model's sliding window of {window} tokens", length, f"at most {window}"))
    if e.tasks:
        zero_shot.check(e.tasks, e.task_folder)


def forecast(recipe: Any) -> Forecast:
    """Peak memory, bytes, operations and time from config.json alone; nothing is sent, so no bits."""
    arch = shape_of(recipe)
    method = registry.load("method", recipe.method.name, verb="prune")(recipe.method)
    details = cost.forecast(arch, method, recipe.calibration.samples, recipe.calibration.length, recipe)
    return Forecast(arch.layers, 0, 0, recipe.participants, details)


def shape_of(recipe: Any) -> Architecture:
    """The architecture of a recipe's model: its folder's config.json, else ``model.shape``, else the embedded model."""
    model = recipe.model
    if model.path is None:
        return Architecture.of(model.shape or embedded_mixtral.config_of(model.embedded), "model.shape")
    folder = Path(model.path)
    if (folder / "config.json").exists() or model.shape is None:
        return Architecture.read(folder)
    return Architecture.of(model.shape, "model.shape")


def find_dense(recipe: Any, ctx: Context, record: Record, stop: Stop) -> Path:
    """The dense checkpoint: the given folder, or the embedded model, trained now or found in the cache beside the runs."""
    if recipe.model.path is not None:
        folder = Path(recipe.model.path)
        if not folder.is_dir():
            hint = "put the checkpoint there (config.json, tokenizer and safetensors), or set model.path"
            raise DataError(Issue("model.path", "no such checkpoint folder", str(folder), hint))
        return folder
    record.note("the model is a small Mixtral trained here on the text of Python's reference manual (bytes)")
    cache = record.folder.parents[2] / ".models"
    workers = ctx.workers(ctx.processes)

    def say(step: int, steps: int, loss: float) -> None:
        record.progress(step, steps, unit="training step", loss=loss)

    if ctx.is_main:
        folder = embedded_mixtral.fetch(recipe.model.embedded, recipe.seed, cache, say, lambda: ctx.processes == 1 and stop.requested(0))
    workers.barrier()
    return folder if ctx.is_main else embedded_mixtral.fetch(recipe.model.embedded, recipe.seed, cache, say, lambda: False)


def tokenizer_of(recipe: Any, dense: Path) -> Any:
    """text -> token ids: the checkpoint's own tokenizer; bytes for a model with 256 tokens, as the embedded one."""
    if (own := recipe.calibration.tokenizer) is not None:
        return windows.tokenizer(Path(own))
    return windows.tokenizer(None if Architecture.read(dense).vocab == windows.BYTES else dense)


def embedded_tokens(recipe: Any, dense: Path, split: str) -> Tensor:
    """A split of the embedded text in the model's tokens, (n,)."""
    text = bytes(windows.embedded()[split].tolist()).decode(errors="replace")
    return torch.tensor(tokenizer_of(recipe, dense)(text), dtype=torch.int64)


def text_windows(recipe: Any, source: str, dense: Path) -> Tensor:
    """Perplexity windows of one text."""
    e = recipe.evaluation
    if source == "embedded":
        return windows.cut(embedded_tokens(recipe, dense, "val"), e.length, e.windows, "evaluation.length")
    return windows.file_windows(Path(source), tokenizer_of(recipe, dense), e.length, e.windows)


def calibration(recipe: Any, dense: Path) -> Tensor:
    """Calibration windows; the same for every method of one seed."""
    c, key = recipe.calibration, Key(recipe.seed, "calibration")
    if c.source == "embedded":
        return windows.draw(embedded_tokens(recipe, dense, "calibration"), c.samples, c.length, key, "calibration")
    return windows.file_samples(Path(c.source), tokenizer_of(recipe, dense), c.samples, c.length, key)


def study_tokens(recipe: Any, dense: Path) -> Tensor | None:
    """What distillation reads: windows (n, length), or the embedded text (n,) that steps of mode ``whole`` cut windows from; None
    without distillation. Asked for before the pruning: a text that will not do is found at once."""
    if (d := recipe.distill) is None:
        return None
    length, key = d.length + (d.mode == "whole"), Key(recipe.seed, "distill")  # the last token of a window is a target only
    if d.source != "embedded":
        return windows.file_samples(Path(d.source), tokenizer_of(recipe, dense), d.samples, length, key)
    text = embedded_tokens(recipe, dense, "train")
    if d.mode == "layers":
        return windows.draw(text, d.samples, length, key, "distill")
    if len(text) <= length:
        raise DataError(Issue("distill.length", f"the text has only {len(text)} tokens", d.length, "lower it"))
    return text


def prune(recipe: Any, ctx: Context, record: Record, stop: Stop, dense: Path, tokens: Tensor) -> Report:
    """One pass over the checkpoint, layer by layer; continues where an earlier start was stopped."""
    method = registry.load("method", recipe.method.name, verb="prune")(recipe.method)
    out = record.folder / "pruned"

    def after(done: int, layers: int) -> bool:
        record.progress(done, layers, unit="layer")
        return stop.requested(done)

    common: dict[str, Any] = {"propagate": recipe.propagate, "batch": recipe.batch, "chunk": recipe.chunk, "device": ctx.device}
    common |= {"compute": getattr(torch, recipe.compute), "workers": ctx.workers(ctx.processes), "progress": after}
    common |= {"save_every": recipe.checkpoint.every or 1}
    if isinstance(method, ExpertMethod):
        return drop_experts(dense, out, tokens, method=method, **common)
    report = prune_checkpoint(
        dense,
        out,
        tokens,
        method=method,
        sparsity=recipe.sparsity,
        pattern=recipe.pattern,
        targets=recipe.targets,
        rescale=recipe.rescale,
        seed=recipe.seed,
        save_sums=record.folder / "sums" if recipe.save_sums else None,
        from_sums=recipe.from_sums,
        save_masks=record.folder / "masks" if recipe.distill else None,
        **common,
    )
    if (
        recipe.from_sums
        and (taken := json.loads((Path(recipe.from_sums) / "sums.json").read_text(encoding="utf-8")))["propagate"] == "pruned"
    ):
        cut = f"{taken['sparsity']:g} ({taken['pattern']})"
        record.note(f"the sums were taken behind layers already cut to sparsity {cut}; propagate=dense sums belong to no sparsity")
    for name in report.fallbacks[:10]:
        record.note(f"too few calibration tokens, cut by magnitude: {name}")
    if len(report.fallbacks) > 10:
        record.note(f"{len(report.fallbacks) - 10} more experts were cut by magnitude; see artefacts/experts.csv")
    return report


def measured(recipe: Any, ctx: Context, record: Record, what: str, folder: Path, texts: dict[str, Tensor], suffix: str) -> dict[str, float]:
    """Perplexity on every text, and lm-eval tasks; kept in the run folder, so that a resumed run does not measure twice."""
    kept = record.folder / f"measured-{what}.json"
    known: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if not known:
        forward = open_forward(folder, **_how(recipe, ctx))
        for i, (name, part) in enumerate(texts.items()):
            loss = window_losses(forward, part)
            known["loss" if i == 0 else f"loss_{name}"] = float(loss.mean())
            known["perplexity" if i == 0 else f"perplexity_{name}"] = perplexity(loss)
        forward.source.close()
        if recipe.evaluation.tasks and what != "dense":
            e = recipe.evaluation
            known |= zero_shot.zero_shot(folder, list(e.tasks), str(ctx.device), task_folder=e.task_folder, limit=e.task_limit)
        ctx.workers(ctx.processes).barrier()
        if ctx.is_main:
            write_json(kept, known)
    return {f"{name}{suffix}": value for name, value in known.items()}


def local_error(recipe: Any, ctx: Context, record: Record, dense: Path, pruned: Path, texts: dict[str, Tensor]) -> float:
    """Mean over layers of the relative error of the experts' gated output, on the first text, with the dense model's inputs."""
    a, b = (open_forward(folder, **_how(recipe, ctx)) for folder in (dense, pruned))
    errors = layer_errors(a, b, next(iter(texts.values())))
    a.source.close()
    b.source.close()
    if record.is_main and [line["value"] for line in record.read() if line["name"] == "layer_error"] != errors:
        record.forget("layer_error")  # some of them, of a start that was killed here
        for layer, error in enumerate(errors):
            record.log(layer + 1, {"layer_error": error}, split="test")
    return mean(errors)


def skipping(recipe: Any, ctx: Context, folder: Path, tokens: Tensor, texts: dict[str, Tensor]) -> float:
    """Perplexity on the first text with NAEE's dynamic skipping, thresholds from the calibration tokens."""
    forward = open_forward(folder, **_how(recipe, ctx))
    found = perplexity(window_losses(forward, next(iter(texts.values())), skip_thresholds(forward, tokens)))
    forward.source.close()
    return found


def distil_streamed(recipe: Any, ctx: Context, record: Record, stop: Stop, dense: Path, pruned: Path, tokens: Tensor) -> Path:
    """Distil layer by layer from disk to disk, masks kept; the processes share the experts."""
    out, layers = record.folder / "distilled", Architecture.read(dense).layers

    def after(done: int, total: int) -> bool:
        record.progress(done, total, unit="distilled layer")
        return stop.requested(layers + done)

    rows = distil_layers(dense, pruned, record.folder / "masks", out, tokens, recipe.distill, seed=recipe.seed, progress=after,
                         save_every=recipe.checkpoint.every or 1, **_how(recipe, ctx))  # fmt: skip
    record.rewind(layers)
    for layer in sorted({r["layer"] for r in rows}):
        of = [r for r in rows if r["layer"] == layer]
        record.log(layers + layer + 1, {f"expert_mse_{at}": mean([r[at] for r in of]) for at in ("before", "after")}, split="train")
    return out


def _how(recipe: Any, ctx: Context) -> dict[str, Any]:
    compute = getattr(torch, recipe.compute)
    return {"compute": compute, "device": ctx.device, "workers": ctx.workers(ctx.processes), "batch": recipe.batch, "chunk": recipe.chunk}


def distil(recipe: Any, ctx: Context, record: Record, stop: Stop, dense: Path, pruned: Path, tokens: Tensor) -> Path:
    """Distil the pruned model from the dense one, masks kept; every process computes the same."""
    out, d = record.folder / "distilled", recipe.distill
    if (out / "config.json").exists():
        return out
    arch = Architecture.read(dense)
    student, teacher = Decoder(arch), Decoder(arch)
    for model, folder in ((student, pruned), (teacher, dense)):
        source = Source(folder)
        model.load(source)
        source.close()
    distiller = Distiller(student, teacher, masks_of(record.folder / "masks", arch), d)
    checkpoints = Checkpoints(record.folder, recipe.checkpoint, ctx, record.note)
    first = 0
    if (saved := checkpoints.latest()) is not None:
        first = saved.step
        student.load_state_dict(saved.model())
        distiller.optimizer.load_state_dict(saved.shared["optimizer"])
        distiller.factor = saved.shared["factor"]
    record.rewind(arch.layers + first)

    for step in range(first, d.steps):
        if stop.requested(arch.layers + step):
            _save(checkpoints, distiller, step)
            raise Stopped(Issue(str(record.folder), f"stopped after distillation step {step} of {d.steps}", has_value=False))
        generator = Key(recipe.seed, "distill/batch", step).generator()
        if tokens.ndim == 1:
            starts = torch.randint(len(tokens) - d.length - 1, (d.batch_size,), generator=generator).tolist()
            batch = torch.stack([tokens[s : s + d.length + 1] for s in starts])
        else:
            batch = tokens[torch.randint(len(tokens), (d.batch_size,), generator=generator)]
        losses = distiller.step(batch, rate(d, step))
        if not math.isfinite(losses.ce + losses.expert):
            raise Diverged(Issue("distill", f"the loss is not finite at step {step}", losses.ce, "lower distill.lr"))
        done = step + 1
        record.progress(done, d.steps, unit="distillation step", loss=losses.ce)
        if done % recipe.log.every == 0 or done == d.steps:
            values = {"batch_loss": losses.ce, "expert_loss": losses.expert, "expert_factor": losses.factor}
            record.log(arch.layers + done, values, split="train")
        if recipe.checkpoint.every and done % recipe.checkpoint.every == 0 and done < d.steps:
            _save(checkpoints, distiller, done)
    if ctx.is_main:
        write_like(pruned, out, student.state_dict())
    ctx.workers(ctx.processes).barrier()
    return out


def write_like(model: Path, out: Path, state: Mapping[str, Tensor]) -> None:
    """Write ``state`` with the shards, dtypes and companion files of the checkpoint ``model``; config.json comes last."""
    source = Source(model)
    target = Target(out, source.headers)
    target.create()
    for name in source.entries:
        if name in state:
            target.write(name, state[name])
        else:
            target.copy(source, name)
    target.sync()
    target.close()
    source.close()
    target.write_index()
    copy_companions(model, out)


def _save(checkpoints: Checkpoints, distiller: Distiller, step: int) -> None:
    shared = {"optimizer": distiller.optimizer.state_dict(), "factor": distiller.factor}
    checkpoints.save(step, shared=shared, workers={}, model=distiller.student.state_dict())


def write_tables(record: Record, report: Report, dense: Path, final: Path, metrics: dict[str, float]) -> None:
    """artefacts/experts.csv, router_load.csv, and summary.md, which says what became smaller or faster and what did not."""
    if not record.is_main:
        return
    if report.experts:
        with record.artefact("experts.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(report.experts[0]))
            table.writeheader()
            table.writerows(report.experts)
    with record.artefact("router_load.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["layer", "top1_cv", "topk_cv", "tokens per expert (top-k slots)"])
        lines.writerows([row["layer"], row["top1_cv"], row["topk_cv"], " ".join(map(str, row["topk"]))] for row in report.layers)
    before, after = stored_bytes(dense), stored_bytes(final)
    share = after["zeros"] / max(1, after["weights"])
    text = [
        "| | dense | pruned |",
        "|---|---|---|",
        f"| weights on disk and in memory | {before['dense'] / 1e6:.2f} MB | {after['dense'] / 1e6:.2f} MB |",
        f"| zeros among expert weights | {before['zeros'] / max(1, before['weights']):.1%} | {share:.1%} |",
        f"| if packed as bit mask + nonzero values | {before['dense'] / 1e6:.2f} MB | {after['packed'] / 1e6:.2f} MB |",
        *(f"| {name} | {metrics[f'{name}_dense']:.4f} | {metrics[name]:.4f} |" for name in ("loss", "perplexity")),
        "",
    ]
    if after["dense"] < before["dense"]:
        text.append("Whole experts are gone: the checkpoint is smaller, and any runtime needs less memory for it.")
    else:
        text.append(
            "Masked weights are stored as zeros in an ordinary checkpoint: it loads everywhere, and it is not smaller or faster by itself."
        )
        text.append(
            "Current serving runtimes have removed their sparse kernels, 2:4 included; the packed size matters for storage and transfer."
        )
    record.artefact("summary.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
