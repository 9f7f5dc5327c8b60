"""The parts of a pipeline run: the network cut into blocks, this process's stages, and the pipes between them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xutrain import registry
from xutrain.data.base import Batch, Task
from xutrain.engine.context import Context
from xutrain.engine.partition import block_of, cut, layer_seconds, layers_of
from xutrain.engine.pipes import Message, Pipes
from xutrain.engine.workers import Workers
from xutrain.errors import DataError, Issue, RecipeError
from xutrain.methods.pipeline.base import Kept, PipelineMethod, Stage, frozen_statistics

#: Of one stage's block: key in its own state, key in the whole network's, shape, type.
Names = list[tuple[str, str, tuple[int, ...], torch.dtype]]


@dataclass
class Job:
    """What one process of a pipeline run works with.

    Attributes:
        stages: the hosted stages, ascending.
        bounds: first layer of every stage, and the number of layers.
        messages: what crosses each boundary.
        names: by stage, how its tensors are called in the whole network.
        steps: N, batches of the run.
    """

    recipe: Any
    ctx: Context
    task: Task
    workers: Workers
    method: PipelineMethod
    stages: list[Stage]
    bounds: list[int]
    messages: list[Message]
    names: list[Names]
    steps: int
    steps_per_epoch: int
    drawn: dict[int, Batch] = field(default_factory=dict)

    def batch(self, index: int) -> Batch:
        """Training batch ``index``; kept while the process that feeds stage 0 also computes the loss."""
        if index in self.drawn:
            return self.drawn.pop(index)
        batch = self.task.draw(index, 0, 1, self.recipe.train.batch_size, self.recipe.seed).to(self.ctx.device)
        if self.workers.processes == 1 and self.workers.count > 1:
            self.drawn[index] = batch
        return batch

    def loss(self, outputs: Tensor, index: int) -> Tensor:
        """The loss of batch ``index``; the last stage reads the labels itself."""
        return self.task.loss(outputs, self.batch(index))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole network's tensors, gathered from all stages, on every process."""
        flat = [
            torch.cat(
                [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in s.block.state_dict().values()]
                or [torch.empty(0, dtype=torch.uint8)]
            )
            for s in self.stages
        ]
        found: dict[str, Tensor] = {}
        for names, data in zip(self.names, self.workers.gather([f.to(self.ctx.device) for f in flat]), strict=True):
            at = 0
            for _, whole, shape, dtype in names:
                size = torch.empty(shape, dtype=dtype, device="meta").nbytes
                found[whole] = data[at : at + size].clone().view(dtype).reshape(shape)
                at += size
        return found


def build(recipe: Any, ctx: Context, bounds: list[int] | None = None) -> Job:
    """Data, blocks and method of a recipe; ``bounds`` of an earlier start where the cut was measured.

    Raises:
        RecipeError, DataError: a network that cannot be cut so, or batches of different shapes.
    """
    task = registry.load("dataset", recipe.data.name).build(recipe.data, recipe.seed)
    size = recipe.train.batch_size
    if size > task.num_train:
        raise RecipeError(Issue("train.batch_size", f"a batch is larger than the {task.num_train} training samples", size, "lower it"))
    per_epoch = task.steps_per_epoch(size)
    steps = recipe.train.steps or max(1, round(recipe.train.epochs * per_epoch))
    workers = ctx.workers(recipe.stages)
    ctx.seed_torch("init")
    module = registry.load("model", recipe.model.name).build(recipe.model, task)
    layers = layers_of(module)
    sample = _sample(task, recipe, steps)
    if bounds is None:
        bounds = cut(module, recipe.stages, recipe.split, _measured(layers, sample, recipe, ctx, workers))
    method: PipelineMethod = registry.load("method", recipe.method.name, verb="pipeline")(recipe.method, recipe.stages)
    blocks = [block_of(layers, bounds[k], bounds[k + 1]) for k in range(recipe.stages)]
    names = _names(module, blocks)
    job = Job(recipe, ctx, task, workers, method, [], bounds, [], names, steps, per_epoch)
    for k in workers.hosted:
        block = blocks[k].to(ctx.device)
        block.train()
        job.stages.append(Stage(k, recipe.stages, block, optimizer_of(recipe.optimizer, block), recipe.seed, job.loss))
    del layers, blocks, module
    outputs = negotiate(job, sample.inputs.to(ctx.device))
    job.messages = outputs[:-1]
    for stage in job.stages:
        method.prepare(stage, outputs[stage.index].empty(ctx.device))
    return job


def optimizer_of(options: Any, block: nn.Module) -> torch.optim.Optimizer | None:
    """A stage's own optimizer (torch's, one tensor at a time); None where the block has no parameters."""
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not parameters:
        return None
    if options.name == "adam":
        betas = (options.momentum, options.beta2)
        return torch.optim.Adam(parameters, lr=options.lr, betas=betas, eps=options.eps, weight_decay=options.weight_decay, foreach=False)
    nesterov = options.nesterov and options.momentum > 0  # without momentum the two are one, and torch refuses to be asked
    return torch.optim.SGD(
        parameters, lr=options.lr, momentum=options.momentum, nesterov=nesterov, weight_decay=options.weight_decay, foreach=False
    )


def _sample(task: Task, recipe: Any, steps: int) -> Batch:
    """The first batch, after a look at others: shapes must not change between batches."""
    first = task.draw(0, 0, 1, recipe.train.batch_size, recipe.seed)
    for step in {min(1, steps - 1), steps - 1}:
        other = task.draw(step, 0, 1, recipe.train.batch_size, recipe.seed)
        if other.inputs.shape != first.inputs.shape or other.inputs.dtype != first.inputs.dtype:
            what = f"batch 0 has inputs of shape {tuple(first.inputs.shape)}, batch {step} of {tuple(other.inputs.shape)}"
            raise DataError(
                Issue(
                    "data",
                    f"{what}; the boundaries of a pipeline carry one shape",
                    has_value=False,
                    hint="resize or pad the inputs to one size",
                )
            )
    return first


def _measured(layers: list[nn.Module], sample: Batch, recipe: Any, ctx: Context, workers: Workers) -> list[float] | None:
    """Seconds of every layer as process 0 measured them, or None where the cut needs none."""
    if recipe.split.by != "time" or recipe.split.cuts is not None:
        return None
    costs: list[float] = []
    if ctx.is_main:
        costs = [forward + backward for forward, backward in layer_seconds(layers, sample.inputs)]
    everyone = workers.objects([costs] * len(workers.hosted))
    return list(everyone[0])


def _names(module: nn.Module, blocks: list[nn.Sequential]) -> list[Names]:
    """A tensor that the network has under several names (tied weights) keeps all of them."""
    whole: dict[int, list[str]] = {}
    for name, t in module.state_dict(keep_vars=True).items():
        whole.setdefault(id(t), []).append(name)

    def name_of(t: Tensor) -> str:
        names = whole[id(t)]
        return names.pop(0) if len(names) > 1 else names[0]

    return [[(key, name_of(t), tuple(t.shape), t.dtype) for key, t in block.state_dict(keep_vars=True).items()] for block in blocks]


def negotiate(job: Job, inputs: Tensor) -> list[Message]:
    """Shape and type that every stage puts out, found by passing a batch up once; equal on every process."""
    found: list[Message] = []
    parts = getattr(job.recipe.method, "micro_batches", 1)
    for process in range(job.workers.processes):
        mine: list[Message] = []
        if process == job.ctx.rank:
            x = found[-1].empty(job.ctx.device).zero_() if found else inputs
            for stage in job.stages:
                if len(x) == parts:
                    _passed(stage, x[:1])  # what a micro-batch is
                x = _passed(stage, x)
                mine.append(Message.of(x))
        everyone = job.workers.objects([(m.shape, m.dtype) for m in mine] if mine else [None] * len(job.workers.hosted))
        found += [Message(tuple(shape), dtype) for shape, dtype in everyone[process * job.workers.each : (process + 1) * job.workers.each]]
    return found


def _passed(stage: Stage, x: Tensor) -> Tensor:
    """F_k(x). Raises RecipeError where the block cannot take so few samples: batch norm of one value."""
    try:
        with torch.no_grad(), frozen_statistics(stage.block):
            return stage.call(x, 0)
    except ValueError as reason:
        if len(x) > 1:
            raise
        what = f"stage {stage.index} cannot train on a single sample: {reason}"
        raise RecipeError(Issue("train.batch_size", what, has_value=False, hint="larger batches, or fewer micro-batches")) from reason


def evaluate(job: Job, pipes: Pipes, split: str) -> dict[str, float]:
    """Mean metrics of ``split`` with every stage's present weights; the pipeline's queues are left alone.

    Batches pass through the processes in order and the last stage adds their scores in batch order.
    """
    rank, last = job.ctx.rank, job.workers.processes - 1
    sums: dict[str, tuple[float, float]] = {}
    handed: deque[list[tuple[Tensor, Any]]] = deque()
    for stage in job.stages:
        stage.block.eval()
    with torch.no_grad():
        for batch in job.task.batches(split, job.recipe.eval.batch_size):
            placed = batch.to(job.ctx.device)
            x = placed.inputs if rank == 0 else pipes.accept(rank - 1, getattr(torch, job.messages[job.stages[0].index - 1].dtype))
            for stage in job.stages:
                x = stage.block(x)
            if rank < last:
                handed.append(pipes.hand(x, rank + 1))
                if len(handed) > 2:
                    _wait(handed.popleft())
                continue
            for name, (value, weight) in job.task.score(x, placed).items():
                total, weights = sums.get(name, (0.0, 0.0))
                sums[name] = (total + value, weights + weight)
    while handed:
        _wait(handed.popleft())
    for stage in job.stages:
        stage.block.train()
    sums = job.workers.objects([sums] * len(job.stages))[-1]
    return {name: total / weight if weight else float("nan") for name, (total, weight) in sums.items()}


def _wait(handles: list[tuple[Tensor, Any]]) -> None:
    for _, work in handles:
        work.wait()


def stage_state(stage: Stage, method: PipelineMethod, up: list[Tensor], down: list[Tensor]) -> dict[str, Any]:
    """All of a stage that a resumed run needs, and the messages in flight towards it."""
    kept = [
        {"batch": k.batch, "version": k.version, "inputs": k.inputs, **({"weights": k.weights} if k.weights else {})} for k in stage.kept
    ]
    optimizer = stage.optimizer.state_dict() if stage.optimizer is not None else {}
    return {
        "block": dict(stage.block.state_dict()),
        "optimizer": optimizer,
        "updates": stage.updates,
        "most_kept": stage.most_kept,
        "kept": kept,
        "method": method.state(stage),
        "activations": up,
        "gradients": down,
    }


def restore_stage(stage: Stage, method: PipelineMethod, pipes: Pipes, state: dict[str, Any]) -> None:
    """Undo ``stage_state`` in a new process."""
    stage.block.load_state_dict(state["block"])
    if stage.optimizer is not None:
        stage.optimizer.load_state_dict(state["optimizer"])
    stage.updates, stage.most_kept = state["updates"], state["most_kept"]
    method.load_state(stage, state["method"])
    for item in state["kept"]:
        weights = {n: t.requires_grad_() for n, t in item["weights"].items()} if "weights" in item else None
        kept = Kept(item["batch"], item["version"], item["inputs"], weights)
        method.rebuild(stage, kept)
        stage.kept.append(kept)
    if state["activations"]:
        pipes.activations[stage.index - 1].fill(state["activations"])
    if state["gradients"]:
        pipes.gradients[stage.index].fill(state["gradients"])
