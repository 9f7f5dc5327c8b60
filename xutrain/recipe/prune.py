"""The recipe of `xutrain prune`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from xutrain.errors import Issue
from xutrain.recipe.schema import Choice, Named, Options, Recipe


class Embedded(Options):
    """A small Mixtral on bytes of real text, trained once and cached; used when model.path is null."""

    hidden: int = Field(64, ge=8, le=4096, description="width")
    ffn: int = Field(128, ge=8, le=16384, description="width of an expert")
    layers: int = Field(3, ge=1, le=64, description="decoder layers")
    heads: int = Field(4, ge=1, description="attention heads")
    kv_heads: int = Field(2, ge=1, description="key and value heads")
    experts: int = Field(8, ge=1, le=256, description="experts per layer")
    top_k: int = Field(2, ge=1, description="experts per token")
    steps: int = Field(500, ge=1, description="training steps")
    batch_size: int = Field(8, ge=1, description="sequences per step")
    length: int = Field(256, ge=2, description="bytes per sequence")
    lr: float = Field(3e-3, gt=0, le=1, description="peak learning rate")
    balance: float = Field(0.01, ge=0, description="factor of the per-layer load-balancing loss")
    outliers: bool = Field(False, description="rescale channels after training without changing the function, as large models have them")


class Model(Options):
    """The checkpoint to prune."""

    path: str | None = Field(None, description="folder with config.json and safetensors; null: the embedded model")
    shape: dict[str, Any] | None = Field(None, description="contents of config.json, for a dry run without weights")
    embedded: Embedded = Embedded()


class Calibration(Options):
    """The tokens that statistics are taken from."""

    source: str = Field("embedded", description="embedded, or a .txt, .jsonl or C4 .json.gz file")
    samples: int = Field(128, ge=1, le=10**6, description="sequences")
    length: int = Field(2048, ge=2, le=10**6, description="tokens per sequence")
    tokenizer: str | None = Field(None, description="folder of the tokenizer; null: the model's own folder")


class Evaluation(Options):
    """What is measured before and after."""

    texts: dict[str, str] = Field(
        default_factory=lambda: {"embedded": "embedded"}, description="name -> embedded or a text file; the first is `perplexity`"
    )
    length: int = Field(2048, ge=2, description="tokens per window")
    windows: int | None = Field(None, ge=1, description="at most this many windows per text")
    local_error: bool = Field(True, description="relative output error of each MoE layer on the first text")
    tasks: list[str] = Field(default_factory=list, description="lm-eval tasks, zero-shot (needs the eval extra)")
    task_folder: str | None = Field(None, description="folder with lm-eval task files of your own, searched besides lm-eval's")
    task_limit: int | None = Field(None, ge=1, description="at most this many documents per task; the paper uses all")
    skipping: bool = Field(False, description="also the perplexity with NAEE's dynamic skipping of the second expert (top-2 models)")


class Distill(Options):
    """Expert-wise distillation after pruning, masks kept: whole models in memory, or one layer after the other from the disk."""

    mode: Literal["whole", "layers"] = Field(
        "whole",
        description="whole: L_CE and L_expert, both models in memory; layers: L_expert alone, one expert in memory (inputs=teacher)",
    )
    steps: int = Field(120, ge=1, description="optimizer steps (mode layers: of every expert)")
    batch_size: int = Field(8, ge=1, description="sequences per step (mode layers: a step takes the expert's share of so many)")
    length: int = Field(256, ge=2, description="tokens per sequence")
    lr: float = Field(3e-4, gt=0, le=1, description="peak learning rate; cosine after warm-up")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps that warms up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    clip_norm: float = Field(1.0, gt=0, description="clip the gradient to this L2 norm")
    expert_loss: Literal["auto"] | float = Field(
        "auto", description="factor of the expert loss; auto: L_CE / L_expert at the first step; 0: L_CE only"
    )
    tokens: Literal["teacher", "both"] = Field("teacher", description="tokens compared: routed by the teacher, or by both")
    inputs: Literal["own", "teacher"] = Field("own", description="hidden states that the student's experts see in L_expert")
    train: Literal["all", "experts"] = Field("all", description="parameters that are trained")
    source: str = Field("embedded", description="embedded (its training split), or a text file")
    samples: int = Field(1000, ge=1, description="sequences drawn from a file (mode layers: from any source)")


class PruneRecipe(Recipe):
    """Model, calibration, method, pattern, evaluation, distillation."""

    model: Model = Model()
    calibration: Calibration = Calibration()
    method: Annotated[Named, Choice("method", default="moe_pruner")]
    sparsity: float = Field(0.5, ge=0, le=1, description="share of each group that goes, for pattern unstructured")
    pattern: str = Field("unstructured", description="unstructured, or kept:group such as 2:4")
    targets: Literal["experts", "experts+attn"] = Field(
        "experts", description="what is pruned; experts+attn: attention by the ungated score"
    )
    propagate: Literal["pruned", "dense"] = Field("pruned", description="whose output the next layer is calibrated with")
    rescale: bool = Field(False, description="fold one factor per output row into the pruned matrices (ours)")
    save_sums: bool = Field(False, description="keep the calibration sums in the run folder, for another cut")
    from_sums: str | None = Field(None, description="folder of sums to cut from, without calibration")
    batch: int = Field(8, ge=1, description="sequences per attention pass")
    chunk: int = Field(8192, ge=1, description="tokens per expert pass")
    compute: Literal["float32", "bfloat16", "float64"] = Field("float32", description="dtype of the calibration pass")
    workers: int = Field(8, ge=1, le=4096, description="experts of a layer are dealt to this many; the number of processes must divide it")
    evaluation: Evaluation = Evaluation()
    distill: Distill | None = None

    @property
    def participants(self) -> int:
        return self.workers

    def issues(self) -> list[Issue]:
        found = list(super().issues())
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if self.pattern != "unstructured" and (match is None or int(match[2]) == 0 or int(match[1]) > int(match[2])):
            found.append(Issue("pattern", "unstructured, or kept:group with kept <= group", self.pattern, 'for example pattern="2:4"'))
        size = self.model.embedded
        if size.hidden % size.heads or size.heads % size.kv_heads:
            found.append(Issue("model.embedded.heads", "must divide hidden, and be a multiple of kv_heads", size.heads))
        if size.top_k > size.experts:
            found.append(Issue("model.embedded.top_k", f"exceeds model.embedded.experts={size.experts}", size.top_k))
        if self.distill is not None and isinstance(self.distill.expert_loss, float) and not math.isfinite(self.distill.expert_loss):
            found.append(Issue("distill.expert_loss", "must be finite", self.distill.expert_loss))
        if self.distill is not None and self.distill.mode == "layers" and self.distill.inputs != "teacher":
            hint = "set distill.inputs=teacher: no gradient crosses layers in this mode"
            found.append(Issue("distill.inputs", "distill.mode=layers compares experts on the teacher's hidden states", "own", hint))
        whole = self.method.name in ("naee", "reap", "ean", "frequency")
        if whole and self.distill is not None:
            found.append(Issue("distill", f"method {self.method.name} drops whole experts and leaves no masks to keep", has_value=False))
        if whole and (self.rescale or self.save_sums or self.from_sums or self.pattern != "unstructured"):
            what = "rescale, save_sums, from_sums and pattern are for methods that prune weights"
            found.append(Issue("method.name", what, self.method.name, "leave them out, or choose moe_pruner, wanda, path, ..."))
        if self.from_sums and (self.rescale or self.save_sums):
            found.append(Issue("from_sums", "no tokens are seen, as rescale and save_sums need", self.from_sums, "leave them out"))
        if self.targets == "experts+attn":
            if self.method.name in ("sparsegpt", "naee", "reap", "ean", "frequency"):
                hint = "wanda, moe_pruner, path, magnitude and random prune attention too"
                found.append(Issue("targets", f"method {self.method.name} prunes experts only", self.targets, hint))
            if self.distill is not None:
                hint = "distil without attention in targets, or prune attention without distill"
                found.append(Issue("targets", "distillation keeps the masks of experts only", self.targets, hint))
            if self.save_sums or self.from_sums:
                found.append(Issue("targets", "cached sums hold no attention", self.targets, "leave save_sums and from_sums out"))
        if not self.evaluation.texts:
            found.append(Issue("evaluation.texts", "names no text", hint="for example {wikitext: wiki.test.raw}", has_value=False))
        return found
