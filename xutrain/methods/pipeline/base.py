"""What a pipeline method answers: its delays, what a stage keeps of a forward pass, and how it goes backward.

A network is cut into K stages F_0 .. F_{K-1}. In its iteration n stage k forwards batch f = n - P_k and, if the error
gradient of batch b = f - m_k has arrived, goes backward on b and updates. `xutrain.loops.pipelined` walks the stages:

    h = m.forward(stage, f, x)         what goes up; the stage keeps what it needs to come back
    d = m.backward(stage, f, b, g)     what goes down; parameter gradients are in place afterwards, ready to be applied

Nothing here knows of processes. Symbols: w_k parameters of stage k, h_k its input, g_{k+1} = dL/dh_{k+1}.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from xutrain.engine.rng import Key
from xutrain.engine.statistics import frozen_statistics as frozen_statistics
from xutrain.recipe.delays import Delays
from xutrain.registry import Named

Loss = Callable[[Tensor, int], Tensor]
State = dict[str, Any]


@dataclass
class Kept:
    """What a stage remembers of the forward pass of one batch.

    Attributes:
        batch: its index.
        version: updates that the stage had made when it forwarded the batch.
        inputs: h_k, detached.
        weights: a copy of w_k at that time, where the method stashes it.
        leaf, outputs: the graph from h_k to h_{k+1}, where the method keeps it.
    """

    batch: int
    version: int
    inputs: Tensor
    weights: dict[str, Tensor] | None = None
    leaf: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Applied:
    """One line of the staleness ledger: which versions of w_k a batch met (versions count the stage's own updates)."""

    stage: int
    batch: int
    forward_version: int
    backward_version: int
    applied_to: int


class Stage:
    """Block k of K with its own optimizer and its own memory. Lives on one process.

    Attributes:
        kept: forward passes that await their error gradient, oldest first.
        updates: how many updates the block has had.
        applied: ledger lines since they were last collected.
        most_kept: the largest number of batches ever kept.
    """

    def __init__(self, index: int, count: int, block: nn.Module, optimizer: torch.optim.Optimizer | None, seed: int, loss: Loss) -> None:
        self.index, self.count, self.block, self.optimizer, self.seed, self.loss = index, count, block, optimizer, seed, loss
        self.kept: deque[Kept] = deque()
        self.memory: State = {}
        self.updates = 0
        self.most_kept = 0
        self.applied: list[Applied] = []
        self.losses: list[tuple[int, float]] = []
        self.parameters = {n: p for n, p in block.named_parameters() if p.requires_grad}

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def keep(self, kept: Kept) -> None:
        self.kept.append(kept)
        self.most_kept = max(self.most_kept, len(self.kept))

    def release(self, batch: int) -> Kept:
        kept = self.kept.popleft()
        assert kept.batch == batch, f"stage {self.index} goes backward on batch {batch} but kept {kept.batch}"
        return kept

    def clone(self) -> dict[str, Tensor]:
        """A copy of w_k that autograd can differentiate by."""
        return {n: p.detach().clone().requires_grad_() for n, p in self.parameters.items()}

    def leaf(self, inputs: Tensor) -> Tensor:
        """h_k as a leaf whose gradient goes down; the data batch needs none."""
        return inputs if self.first or not inputs.is_floating_point() else inputs.detach().requires_grad_()

    def call(self, inputs: Tensor, batch: int, weights: dict[str, Tensor] | None = None) -> Tensor:
        """F_k(inputs) with the randomness of (run seed, block, batch), so a recomputation draws the same masks."""
        devices = [inputs.device] if inputs.device.type == "cuda" else []
        seed = Key(self.seed, "block", batch, self.index).integer
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace per absent kind of device: 2 ms a tick
            if devices:
                torch.cuda.manual_seed(seed)
            out = self.block(inputs) if weights is None else functional_call(self.block, weights, (inputs,))
        assert isinstance(out, Tensor), f"stage {self.index} returns {type(out).__name__}, not one tensor"
        return out

    def pull(self, outputs: Tensor, leaf: Tensor, batch: int, g: Tensor | None, weights: dict[str, Tensor] | None = None) -> Tensor | None:
        """Backward from the loss (last stage) or from g_{k+1}: sets the parameters' gradients, returns g_k (None at stage 0)."""
        wrt = list((weights or self.parameters).values())
        inputs = [leaf] if leaf.requires_grad else []
        if self.last:
            outputs = self.loss(outputs, batch)
            self.losses.append((batch, float(outputs.detach())))
        if not outputs.requires_grad:
            return None
        found = torch.autograd.grad(outputs, [*wrt, *inputs], g, allow_unused=True)
        for parameter, grad in zip(self.parameters.values(), found, strict=False):
            parameter.grad = grad
        return found[-1] if inputs else None


class PipelineMethod:
    """Base of the methods of `xutrain pipeline`.

    Class attributes:
        cost: nominal units of work of (forward, backward), for padded runs and time models: F = 1, R = 1, B = 2.
        late: the error gradient is awaited after the forward pass; False: before it.
        flush: each batch is cut into micro-batches that fill and empty the pipeline (torch.distributed.pipelining runs it).
    """

    cost: ClassVar[tuple[int, int]] = (1, 2)
    late: ClassVar[bool] = True
    flush: ClassVar[str | None] = None

    class Options(Named):
        def delays(self, stages: int) -> Delays:
            """The delays for ``stages`` stages. Raises RecipeError."""
            raise NotImplementedError

    def __init__(self, options: Any, stages: int) -> None:
        self.options = options
        self.delays: Delays = options.delays(stages)

    def prepare(self, stage: Stage, output: Tensor) -> None:
        """Make what the stage needs beyond its block; ``output`` has the shape, type and device of one batch's h_{k+1}."""

    def forward(self, stage: Stage, f: int, x: Tensor) -> Tensor | None:
        """Forward batch f; returns h_{k+1}, detached (None at the last stage)."""
        raise NotImplementedError

    def backward(self, stage: Stage, f: int | None, b: int | None, g: Tensor | None) -> Tensor | None:
        """Go backward on batch b (None: nothing has arrived yet) with error gradient g; returns what goes down."""
        raise NotImplementedError

    def target(self, stage: Stage, f: int | None, b: int | None) -> int | None:
        """The batch whose gradient is in the parameters after ``backward``: b, or None for no update."""
        return b

    def rate(self, stage: Stage, batch: int) -> float:
        """Factor of the learning rate."""
        return 1.0

    def applied(self, stage: Stage) -> None:
        """Called after the update."""

    def rebuild(self, stage: Stage, kept: Kept) -> None:
        """Make again, after a resume, what a checkpoint cannot hold (an autograd graph)."""

    def state(self, stage: Stage) -> State:
        """The method's own memory of a stage, for a checkpoint."""
        return {}

    def load_state(self, stage: Stage, state: State) -> None:
        """Undo ``state``."""
