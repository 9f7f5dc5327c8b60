"""Further networks beside the model: built once per process, offered to a method as problems of their own.

Their task is to say which client a sample comes from, so the label is the client's number and needs no data. They are 2-D: of
a volume they look at axial slices, some drawn ones while they train, all of them, averaged, when they decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.engine.context import Context
from xutrain.engine.replica import Replica
from xutrain.engine.rng import Key
from xutrain.errors import Issue, RecipeError
from xutrain.methods.federate.base import Network

if TYPE_CHECKING:
    from xutrain.loops.clients import ClientData
    from xutrain.models.selector import Kind


@dataclass
class Extra:
    """One further network on this process."""

    network: Network
    replica: Replica

    def images(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """``inputs`` as the network trains on them: images as they are, of volumes ``slices`` drawn axial slices."""
        from xutrain.models.selector import slices_of

        if inputs.ndim == 4:
            return inputs
        return slices_of(inputs, torch.randint(inputs.shape[2], (self.network.slices,), generator=generator).to(inputs.device))

    def probabilities(self, vector: Tensor, inputs: Tensor) -> Tensor:
        """Softmax of each sample, shape (b, outputs); evaluation mode, mean over all slices of a volume."""
        from xutrain.models.selector import vote

        self.replica.point(vector)
        module = self.replica.module
        module.eval()
        with torch.no_grad():
            found = vote(module, inputs)
        module.train()
        return found


def build_networks(wanted: dict[str, Network], task: Task, ctx: Context) -> dict[str, Extra]:
    """The modules of a method's further networks, with weights drawn by the run's seed."""
    if not wanted:
        return {}
    from xutrain.models.selector import build_selector, check_selector

    made = {}
    for name, network in wanted.items():
        dims = len(task.input_shape) - 1
        if dims not in (2, 3) or not hasattr(task, "split_sites"):
            what = "a selector tells the sites of images apart, and this data set has none"
            raise RecipeError(Issue("data.name", what, task.name, "choose a data set of several sites, such as medical_synthetic"))
        kind = cast("Kind", network.kind)
        check_selector(kind, task.input_shape[1:])
        ctx.seed_torch(f"init/{name}")
        module: nn.Module = build_selector(kind, task.input_shape[0], dims, network.outputs).to(ctx.device)
        module.train()
        made[name] = Extra(network, Replica(module))
        assert made[name].replica.num_buffer_elements == 0, "a selector has no statistics"
    return made


@dataclass
class WhoseSample:
    """A client's `Problem` for a further network: cross-entropy to the client's own number."""

    extra: Extra
    data: ClientData

    def _loss(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        outputs = self.extra.replica.module(self.extra.images(inputs, generator))
        return nn.functional.cross_entropy(outputs, outputs.new_full((len(outputs),), self.data.client, dtype=torch.int64))

    def _gradient(self, point: Tensor, inputs: Tensor, key: Key) -> Tensor:
        self.extra.replica.point(point)
        self.extra.replica.zero_grad()
        self._loss(inputs, key.generator()).backward()  # type: ignore[no-untyped-call]
        return self.extra.replica.grad()

    def gradient(self, point: Tensor, step: int) -> Tensor:
        data = self.data
        inputs = data.batch(step).to(data.bench.ctx.device).inputs
        return self._gradient(point, inputs, Key(data.bench.ctx.seed, "slices", data.taken + step, data.client))

    def full_gradient(self, point: Tensor) -> Tensor:
        data, total = self.data, torch.zeros_like(point)
        seed, train = data.bench.ctx.seed, data.shard.train
        for i, indices in enumerate(train.split(data.bench.eval_batch)):
            batch = data.bench.task.batch(indices, Key(seed, f"full/{i}", data.taken, data.client)).to(data.bench.ctx.device)
            key = Key(seed, f"slices/{i}", data.taken, data.client)
            total.add_(self._gradient(point, batch.inputs, key), alpha=len(indices) / len(train))
        return total

    def evaluate(self, point: Tensor, split: str = "val") -> dict[str, float]:
        """Share of the client's samples that the network gives to it (this class's recall), and the mean loss; {} without samples."""
        hits, loss, count, own = 0.0, 0.0, 0, self.data.client
        for found in self._probabilities(point, split):
            hits += float((found.argmax(dim=1) == own).sum())
            loss -= float(found[:, own].clamp_min(1e-12).log().sum())
            count += len(found)
        return {"loss": loss / count, "accuracy": hits / count} if count else {}

    def confidence(self, point: Tensor, split: str = "val") -> Tensor:
        """Probability of this client for each of its own samples, shape (n,)."""
        return torch.cat([point.new_empty(0), *(found[:, self.data.client] for found in self._probabilities(point, split))])

    def _probabilities(self, point: Tensor, split: str) -> Iterator[Tensor]:
        """Softmax of the client's samples, block by block."""
        data = self.data
        for chunk in (data.shard.val if split == "val" else data.shard.train).split(data.bench.eval_batch):
            if len(chunk):
                yield self.extra.probabilities(point, data.bench.task.plain(chunk).to(data.bench.ctx.device).inputs)


def describe(extras: dict[str, Extra]) -> dict[str, Any]:
    """Numbers of each further network, for a forecast."""
    return {name: extra.replica.numel for name, extra in extras.items()}
