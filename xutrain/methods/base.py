"""What a data-parallel method answers (verbs quantize, sparsify, pretrain). Other families have their own base file.

The loop asks, for every step: where does worker w take its gradient (``point``), what do the workers' gradients change
(``step``), and which parameters are measured and saved (``deploy``). Nothing here knows of files, devices or processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.replica import Slice
from xutrain.engine.workers import Workers
from xutrain.errors import Issue
from xutrain.methods.codecs.base import Codec
from xutrain.methods.exchange import Exchange
from xutrain.recipe.schema import Optimizer
from xutrain.registry import Named


@dataclass
class Setup:
    """What a method is built from.

    Attributes:
        theta: initial parameters, float32 of shape (D,), equal on all processes.
        layout: where each tensor lies in the flat vector.
        workers: the logical workers; lists of tensors hold one per hosted worker.
        exchange: averages vectors through the recipe's codec and counts the bits.
        optimizer: the base optimizer's options (lr is already in the ``lr`` that ``step`` is given).
        total_steps: planned steps of the run.
        recipe: the whole recipe, for what only one method needs.
    """

    theta: Tensor
    layout: list[Slice]
    workers: Workers
    exchange: Exchange
    optimizer: Optimizer
    ctx: Context
    total_steps: int
    recipe: Any


class DataParallel:
    """Base of the data-parallel methods. ``x`` is the model that all workers know."""

    class Options(Named):
        pass

    #: the method clips by train.clip_norm itself (after averaging); else the loop clips each worker's gradient
    clips_itself = False

    def __init__(self, options: Any, setup: Setup) -> None:
        self.options = options
        self.setup = setup
        self.x = setup.theta.clone()

    def point(self, worker: int) -> Tensor:
        """Parameters at which ``worker`` (hosted here) takes its next gradient; the common model by default."""
        return self.x

    def step(self, grads: list[Tensor], lr: float, step: int) -> None:
        """Take one step with the hosted workers' gradients (consumed)."""
        raise NotImplementedError

    def exchanges(self, step: int) -> bool:
        """Whether the workers exchange anything at ``step``; False inside local steps."""
        return True

    def deploy(self) -> dict[str, Tensor]:
        """Parameters to measure, by name of the point; the first is saved and gives the unsuffixed metrics."""
        return {"x": self.x}

    def planned_bits(self, steps: int) -> dict[str, tuple[int, int]]:
        """Closed form of what ``steps`` steps from the start count: part -> bits (up, down) over all workers."""
        up, down = self.setup.exchange.bits(self.x.numel())
        return {"gradient": (steps * up, steps * down)}

    def state(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """What a checkpoint holds: common state, and the state of each hosted worker."""
        return {"x": self.x}, {}

    def load_state(self, shared: dict[str, Any], worker: Callable[[int], dict[str, Any]]) -> None:
        """Take a checkpoint's state back; ``worker(w)`` gives that of any logical worker."""
        self.x = shared["x"].clone()

    def notes(self) -> list[str]:
        """What a reader of the result must know about this choice of options; written before training starts."""
        return []

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        """What cannot be right between this method's options, the codec and the exchange; asked before anything is built."""
        return []

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth a curve beside the losses (residual norms, adaptive coefficients); the same on every process."""
        return {}
