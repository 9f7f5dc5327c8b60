"""Boundaries between pipeline stages: a queue inside a process, point-to-point messages between processes.

Two process groups, one a direction, no tags, no polling. Messages of a boundary have one shape, negotiated before
training. A receive is posted in the iteration in which its message is sent, so it waits for at most as many messages as
are in flight; a send is waited for p+q messages later, when its receiver must have taken it. So nothing deadlocks, memory is
bounded, and after the same iteration of all stages what is on the wire is known exactly: ``drain`` collects it for a checkpoint.
"""

from __future__ import annotations

import datetime
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.workers import Workers
from xutrain.errors import Issue, RecipeError
from xutrain.recipe.delays import Delays


@dataclass(frozen=True)
class Message:
    """Shape and type of what crosses a boundary, once per batch and direction."""

    shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(tensor: Tensor) -> Message:
        return Message(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def bits(self) -> int:
        return 8 * self.empty("meta").nbytes

    def empty(self, device: torch.device | str) -> Tensor:
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)


class PeerLost(RuntimeError):
    """A message could not be exchanged because the other process is gone."""

    def __init__(self, what: str, peer: int | None, reason: str) -> None:
        self.what, self.peer = what, peer
        super().__init__(f"{what}: {reason}")


class Queue:
    """A boundary direction inside one process."""

    def __init__(self, name: str, message: Message) -> None:
        self.name, self.message = name, message
        self.waiting: deque[Tensor] = deque()
        self.sent = 0
        self.posted = 0

    def put(self, tensor: Tensor) -> None:
        self.check(tensor)
        self.waiting.append(tensor.detach())
        self.sent += 1

    def check(self, tensor: Tensor) -> None:
        """Refuse what the other side did not prepare for: gloo would abort the process, or fill a part."""
        if Message.of(tensor) != self.message:
            what = f"{self.name} changed from {self.message.shape} {self.message.dtype} to {tuple(tensor.shape)} {tensor.dtype}"
            raise RecipeError(
                Issue(
                    "model", f"{what}; every batch must cross a stage boundary in one shape", has_value=False, hint="use inputs of one size"
                )
            )

    def take(self) -> Tensor:
        return self.waiting.popleft()

    def expect(self, count: int) -> None:
        """``count`` messages of this segment have been or are being sent."""

    def drain(self) -> list[Tensor]:
        """What was sent and not taken, oldest first; it can still be taken."""
        return list(self.waiting)

    def fill(self, tensors: list[Tensor]) -> None:
        """Undo ``drain`` in a new process."""
        self.waiting.extend(tensors)

    def settle(self) -> None:
        """Wait until everything sent has left."""


class Sender(Queue):
    """The sending end of a boundary direction between two processes."""

    def __init__(self, name: str, message: Message, peer: int, group: Any, device: torch.device, bound: int) -> None:
        super().__init__(name, message)
        self.peer, self.group, self.device, self.bound = peer, group, device, max(1, bound)
        self.flying: deque[tuple[Tensor, Any]] = deque()

    def put(self, tensor: Tensor) -> None:
        self.check(tensor)
        ready = tensor.detach().contiguous().to(self.device)
        if len(self.flying) >= self.bound:
            self._finish()
        self.flying.append((ready, _guarded(self, dist.isend, ready, dst=self.peer, group=self.group)))
        self.sent += 1

    def _finish(self) -> None:
        _, work = self.flying.popleft()
        _guarded(self, work.wait)

    def settle(self) -> None:
        while self.flying:
            self._finish()

    def take(self) -> Tensor:
        raise AssertionError(f"{self.name}: the sending end has nothing to take")


class Receiver(Queue):
    """The receiving end: receives are posted ahead, each into a buffer of its own."""

    def __init__(self, name: str, message: Message, peer: int, group: Any, device: torch.device, home: torch.device) -> None:
        super().__init__(name, message)
        self.peer, self.group, self.device, self.home = peer, group, device, home
        self.flying: deque[tuple[Tensor, Any]] = deque()

    def expect(self, count: int) -> None:
        while self.posted < count:
            buffer = self.message.empty(self.device)
            self.flying.append((buffer, _guarded(self, dist.irecv, buffer, src=self.peer, group=self.group)))
            self.posted += 1

    def take(self) -> Tensor:
        if self.waiting:
            return self.waiting.popleft()
        assert self.flying, f"{self.name}: nothing was expected"
        buffer, work = self.flying.popleft()
        _guarded(self, work.wait)
        return buffer.to(self.home)

    def drain(self) -> list[Tensor]:
        while self.flying:
            buffer, work = self.flying.popleft()
            _guarded(self, work.wait)
            self.waiting.append(buffer.to(self.home))
        return list(self.waiting)

    def put(self, tensor: Tensor) -> None:
        raise AssertionError(f"{self.name}: the receiving end sends nothing")


def _guarded(end: Any, call: Any, *args: Any, **words: Any) -> Any:
    try:
        return call(*args, **words)
    except RuntimeError as reason:  # gloo and NCCL report a lost peer as RuntimeError
        raise PeerLost(end.name, end.peer, str(reason).splitlines()[0]) from reason


class Pipes:
    """All boundaries of a pipeline, seen from one process.

    Attributes:
        activations: by boundary k|k+1, the end (or queue) that this process has; absent where it has none.
        gradients: the same, downwards.
        messages: shape and type at every boundary.
    """

    def __init__(self, ctx: Context, workers: Workers, delays: Delays, messages: list[Message]) -> None:
        self.ctx, self.workers, self.delays, self.messages = ctx, workers, delays, messages
        self.activations: dict[int, Queue] = {}
        self.gradients: dict[int, Queue] = {}
        self.wire = torch.device("cpu")
        self._groups: list[Any] = [None, None, None]
        if workers.processes > 1:
            if ctx.device.type == "cuda" and "nccl" in str(dist.get_backend(dist.group.WORLD)):
                self.wire = ctx.device
            for i in range(3):  # activations, gradients, evaluation: made by all in one order
                self._groups[i] = dist.new_group(
                    timeout=datetime.timedelta(seconds=float(os.environ.get("XUTRAIN_TIMEOUT_S", "600"))),
                    backend="nccl" if self.wire.type == "cuda" else "gloo",
                )
                dist.barrier(group=self._groups[i])
        for k, message in enumerate(messages):
            up, down = f"the activation from stage {k} to stage {k + 1}", f"the error gradient from stage {k + 1} to stage {k}"
            self._join(self.activations, k, k + 1, up, message, self._groups[0], delays.p[k] + delays.q[k])
            self._join(self.gradients, k + 1, k, down, message, self._groups[1], delays.p[k] + delays.q[k])

    def _join(self, ends: dict[int, Queue], source: int, target: int, name: str, message: Message, group: Any, bound: int) -> None:
        boundary, hosted = min(source, target), self.workers.hosted
        if source in hosted and target in hosted:
            ends[boundary] = Queue(name, message)
        elif source in hosted:
            ends[boundary] = Sender(name, message, self.workers.owner(target), group, self.wire, bound)
        elif target in hosted:
            ends[boundary] = Receiver(name, message, self.workers.owner(source), group, self.wire, self.ctx.device)

    def begin(self, ticks: int, batches: int) -> None:
        """Start counting a segment of ``batches`` batches of which ``ticks`` ticks are done."""
        for ends, counts in self._counts(ticks, batches):
            for k, end in ends.items():
                end.posted = end.sent = counts[k]

    def expect(self, ticks: int, batches: int) -> None:
        """Post receives for all that is sent within the first ``ticks`` ticks of the segment."""
        for ends, counts in self._counts(ticks, batches):
            for k, end in ends.items():
                end.expect(counts[k])

    def _counts(self, ticks: int, batches: int) -> list[tuple[dict[int, Queue], list[int]]]:
        sent = [self.delays.sent(k, ticks, batches) for k in range(len(self.messages))]
        return [(self.activations, [up for up, _ in sent]), (self.gradients, [down for _, down in sent])]

    def drain(self) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
        """What is in flight towards the stages of this process, by receiving stage: (activations, error gradients)."""
        up = {k + 1: end.drain() for k, end in self.activations.items() if not isinstance(end, Sender)}
        down = {k: end.drain() for k, end in self.gradients.items() if not isinstance(end, Sender)}
        return up, down

    def check(self, batches: int) -> None:
        """After a segment: every boundary carried one message a batch in each direction, and nothing is left."""
        for end in (*self.activations.values(), *self.gradients.values()):
            assert isinstance(end, Receiver) or end.sent == batches, f"{end.sent} messages of {end.name}, not {batches}"
            assert not end.waiting, f"{len(end.waiting)} messages of {end.name} were not taken"

    def settle(self) -> None:
        """Wait until everything sent has been received."""
        for end in (*self.activations.values(), *self.gradients.values()):
            end.settle()

    def hand(self, tensor: Tensor, target: int) -> Any:
        """Send a tensor of any shape to process ``target`` on the evaluation group; returns a handle to wait on."""
        ready = tensor.detach().contiguous().to(self.wire)
        shape = torch.tensor([ready.dim(), *ready.shape, *[0] * (8 - ready.dim())], dtype=torch.int64, device=self.wire)
        group = self._groups[2]
        return [(shape, dist.isend(shape, dst=target, group=group)), (ready, dist.isend(ready, dst=target, group=group))]

    def accept(self, source: int, dtype: torch.dtype) -> Tensor:
        """Receive what ``hand`` sent."""
        shape = torch.empty(9, dtype=torch.int64, device=self.wire)
        dist.recv(shape, src=source, group=self._groups[2])
        size = [int(n) for n in shape[1 : 1 + int(shape[0])]]
        buffer = torch.empty(size, dtype=dtype, device=self.wire)
        dist.recv(buffer, src=source, group=self._groups[2])
        return buffer.to(self.ctx.device)
