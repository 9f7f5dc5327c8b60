"""How clients' replies reach the server: encoded, counted, and the same on every process in the order of clients.

The server's state is held by every process, so a plan needs no transport; its bits are counted all the same. A reply
crosses a process boundary as one flat tensor, or as the codec's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.rng import Key
from xutrain.engine.workers import Workers
from xutrain.errors import Diverged, Issue
from xutrain.loops.clients import Kept
from xutrain.methods.codecs.base import Codec, Payload
from xutrain.methods.federate.base import Plan, Reply

BUFFERS = "buffers"


@dataclass
class Sent:
    """A reply on its way: small things in ``head``, vectors as bytes or floats in ``body``.

    ``head["parts"]`` is a list of (name, number of elements, encoded?, length in the body).
    """

    head: dict[str, Any]
    coded: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)


class Uplink:
    """Encodes replies at their client and gives the server what they decode to."""

    def __init__(self, ctx: Context, workers: Workers, codec: Codec, feedback: str, *, silent: bool = False) -> None:
        self.ctx, self.workers, self.codec, self.silent = ctx, workers, codec, silent
        self.dense = codec.dense and codec.payload_bits(1) == 32  # the identity: nothing to encode
        self.feedback = not self.dense and (feedback == "always" or (feedback == "auto" and codec.biased and codec.contractive))
        self._bits: dict[str, list[int]] = {}

    def count_plan(self, plan: Plan) -> None:
        """Count what a hosted client is sent."""
        for name, tensor in plan.tensors.items():
            self._add(name, 1, 32 * tensor.numel())
        for name in plan.numbers:
            self._add(name, 1, 32)

    def count_buffers(self, length: int) -> None:
        """Count the statistics that a hosted client is sent."""
        self._add(BUFFERS, 1, 32 * length)

    def _add(self, part: str, way: int, bits: int) -> None:
        self._bits.setdefault(part, [0, 0])[way] += bits

    def settle(self) -> None:
        """Give the meter what all processes counted since the last call; the same numbers everywhere."""
        mine = self._bits
        self._bits = {}
        total: dict[str, list[int]] = {}
        processes = self.ctx.workers(self.ctx.processes)
        for counted in processes.objects([mine]):
            for part, (up, down) in counted.items():
                held = total.setdefault(part, [0, 0])
                held[0] += up
                held[1] += down
        if not self.silent:
            for part in sorted(total):
                self.ctx.meter.add(part, total[part][0], total[part][1])

    def send(self, reply: Reply, kept: Kept, round: int, exchange: int, loss: float, *, tolerant: bool, count_buffers: bool) -> Sent:
        """Encode a reply at its client. Batch-norm statistics are never encoded, and not counted when they serve the record only.

        Raises:
            Diverged: a vector is not finite; names client and round.
        """
        sent = Sent({"client": reply.client, "numbers": reply.numbers, "measures": reply.measures, "loss": loss, "parts": []})
        sent.head.update(round=round, exchange=exchange)
        for name, tensor in reply.tensors.items():
            sound = math.isfinite(float(tensor.sum()))
            if not tolerant and not sound:
                hint = "lower train.lr or the momenta, or set train.clip_norm"
                raise Diverged(Issue(f"round {round}, client {reply.client}", f"{name} is not finite", has_value=False, hint=hint))
            if self.dense or name == BUFFERS or not sound:  # no codec takes what is not finite
                sent.plain.append(tensor)
                sent.head["parts"].append((name, tensor.numel(), False, tensor.numel()))
                if name != BUFFERS or count_buffers:
                    self._add(name, 0, 32 * tensor.numel())
                continue
            lost = kept.residual.get(name)
            wanted = tensor if lost is None else tensor + lost
            payload = self.codec.encode(wanted, self._key(name, round, exchange, reply.client))
            if self.feedback:
                kept.residual[name] = wanted - self.codec.decode(payload)
            sent.coded.append(payload.data)
            sent.head["parts"].append((name, tensor.numel(), True, payload.data.numel()))
            self._add(name, 0, payload.bits)
        for name in reply.numbers:
            self._add(name, 0, 32)
        return sent

    def _key(self, name: str, round: int, exchange: int, client: int) -> Key:
        """Where a client's vector draws; both ends know it."""
        return self.ctx.key(f"uplink/{exchange}/{name}", round, client)

    def receive(self, head: dict[str, Any], coded: list[Tensor], plain: list[Tensor]) -> Reply:
        """What the server makes of a message."""
        reply = Reply(numbers=head["numbers"], measures=head["measures"], client=head["client"])
        codes, floats = iter(coded), iter(plain)
        for name, length, encoded, _ in head["parts"]:
            if encoded:
                key = self._key(name, head["round"], head["exchange"], head["client"]) if self.codec.shared_support else None
                reply.tensors[name] = self.codec.decode(Payload(next(codes), length, key))
            else:
                reply.tensors[name] = next(floats)
        return reply

    def stream(self, clients: tuple[int, ...], work: Callable[[int], Sent]) -> Iterator[tuple[Reply, float]]:
        """Replies of ``clients`` with their losses, in that order, on every process; ``work`` runs for the hosted ones.

        Alone, a client works when its reply is asked for, so one reply is in memory at a time. With several processes each
        works through its clients first; then their messages are passed on in order.
        """
        if self.ctx.processes == 1:
            for client in clients:
                sent = work(client)
                yield self.receive(sent.head, sent.coded, sent.plain), sent.head["loss"]
            return
        hosted = self.workers.hosted
        mine: dict[int, Sent | None] = {client: work(client) for client in clients if client in hosted}
        processes = self.ctx.workers(self.ctx.processes)
        heads = {k: v for block in processes.objects([{c: s.head for c, s in mine.items() if s}]) for k, v in block.items()}
        for client in clients:
            head, own = heads[client], mine.pop(client, None)
            coded = self._pass_on(client, head, True, own.coded if own else None, torch.uint8)
            plain = self._pass_on(client, head, False, own.plain if own else None, torch.float32)
            yield self.receive(head, coded, plain), head["loss"]

    def _pass_on(self, client: int, head: dict[str, Any], encoded: bool, mine: list[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
        lengths = [size for _, _, coded, size in head["parts"] if coded == encoded]
        if not sum(lengths):
            return [torch.empty(0, dtype=dtype, device=self.ctx.device) for _ in lengths]
        flat = torch.cat(mine) if mine is not None else torch.empty(sum(lengths), dtype=dtype, device=self.ctx.device)
        return list(self.workers.broadcast(flat, client).split(lengths))
