"""Any codec, with or without error feedback, as a communication hook of DistributedDataParallel.

    ddp = DistributedDataParallel(model)
    hook = CompressedHook(ddp, xutrain.codec("random_block", ratio=64), optimizer=optimizer)
    hook.attach()

Every rank is one worker: e <- e + lr u;  c = mean_k C(e^k);  e <- e - C(e);  the optimizer is handed c / lr. With ``momentum`` 0
u is the gradient and the optimizer's own momentum acts after the reduction (PEF of arXiv 2004.05298; PowerSGD with codec
``low_rank``). With ``momentum`` mu, u = m <- mu m + g is local, the optimizer must have none, and the arithmetic is EF's; then
``coeff`` and ``with hook.detached():`` around forward and backward make it DEF (coeff in (0, 1)) or SAEF (coeff 1); ``"adaptive"``
tracks the best coefficient as methods/sparsify/detached.py does, with one more number per bucket.

State is kept by parameter name: DDP rebuilds its buckets after the first step, and a residual belongs to a parameter. One
collective per bucket, started in the hook and finished in its future, so that it overlaps with the backward pass; codec
``low_rank`` needs two, which run in the hook itself. ``mode="alltoall"`` needs two as well, scatter-reduce and all-gather of the
means quantized again: the second of a bucket is started when the next bucket is ready, so both overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xutrain.engine import collectives
from xutrain.engine.network import Link
from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.errors import Issue, UsageError
from xutrain.methods.codecs.base import Codec, Payload, check_finite
from xutrain.methods.exchange import choose, shards
from xutrain.methods.sparsify.detached import Moments


class CompressedHook:
    """Compresses what DDP reduces.

    Args:
        ddp: the DistributedDataParallel module whose gradients are exchanged.
        codec: any codec, as ``xutrain.codec(name, **options)`` builds it.
        error_feedback: send what earlier messages left out as well.
        momentum: local heavy ball before the reduction; the optimizer then has none.
        coeff: part of its residual by which a worker steps ahead inside ``detached``, in [0, 1], or ``adaptive`` (codecs with a shared
            support). ``hook.coeff`` is what it is now.
        optimizer: where the learning rate is read (its first group), so that residuals survive a changed rate; None: rate 1.
        seed: of the codec's draws, the same on all ranks.
        mode: how messages that cannot be added reach everyone: allgather, alltoall (not with error feedback, which would not see
            the second quantization), or auto, the cheaper of them for each bucket on ``link``.
        link: the network that ``auto`` reckons with.
        overlap: go on with the backward pass while a bucket travels; False waits, with the same result bit for bit.

    Raises:
        UsageError: ``coeff``, ``momentum`` or ``mode`` out of range or not for this codec, or what error feedback makes diverge.
        RecipeError: the codec does not fit the parameters (``ratio`` above every tensor).
    """

    def __init__(
        self,
        ddp: nn.Module,
        codec: Codec,
        *,
        error_feedback: bool = True,
        momentum: float = 0.0,
        coeff: float | Literal["adaptive"] = 0.0,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
        mode: Literal["allgather", "alltoall", "auto"] = "allgather",
        link: Link | None = None,
        overlap: bool = True,
    ) -> None:
        self.adaptive = coeff == "adaptive"
        if self.adaptive and not (error_feedback and codec.shared_support):
            why = f"adaptive needs error feedback and messages that all hold the same coordinates, which those of {codec.label} do not"
            raise UsageError(Issue("coeff", why, coeff, "a codec such as random_block, or a number in [0, 1]"))
        now = 1.0 if coeff == "adaptive" else coeff
        if isinstance(now, str) or not 0 <= now <= 1:
            raise UsageError(Issue("coeff", "must be in [0, 1], or adaptive", coeff))
        if now and not error_feedback:
            raise UsageError(Issue("coeff", "is a part of the residual, which there is only with error feedback", coeff, "coeff=0"))
        if not 0 <= momentum < 1:
            raise UsageError(Issue("momentum", "must be in [0, 1)", momentum))
        if momentum and optimizer is not None and any(group.get("momentum") for group in optimizer.param_groups):
            raise UsageError(Issue("momentum", "the optimizer has a momentum of its own", momentum, "give one of them, the other 0"))
        if error_feedback and codec.expands:
            raise UsageError(
                Issue("codec", f"{codec.label} makes residuals grow under error feedback", codec.options.name, "error_feedback=False")
            )
        if mode not in ("allgather", "alltoall", "auto"):
            raise UsageError(Issue("mode", "must be allgather, alltoall or auto", mode))
        if mode == "alltoall" and (error_feedback or codec.per_tensor):
            why = "error feedback would not see the second quantization" if error_feedback else f"{codec.label} works tensor by tensor"
            raise UsageError(Issue("mode", f"alltoall cuts and quantizes twice, and {why}", mode, "mode='allgather'"))
        self.mode, self.link, self.overlap = mode, link or Link(), overlap
        self._second: Callable[[], None] | None = None
        self.ddp, self.codec, self.optimizer = ddp, codec, optimizer
        self.error_feedback, self.momentum, self.coeff, self.seed = error_feedback, momentum, float(now), seed
        self.moments = Moments()
        self._seen: dict[str, tuple[float, float]] = {}  # of this step's buckets, by first name: ||mean block||^2, mean ||block||^2
        self.step = 0
        self.bits = 0
        self.error: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}
        module = getattr(ddp, "module", ddp)
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._buckets: dict[tuple[str, ...], Bucket] = {}
        self._kept: list[Tensor] = []
        codec.lay(slices(list(self._parameters.items())))

    def attach(self) -> CompressedHook:
        """Register with DDP. Returns itself."""
        self.ddp.register_comm_hook(self, lambda hook, bucket: hook.run(bucket))  # type: ignore[operator]
        return self

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Forward and backward inside see x - coeff e; afterwards the parameters are x again, bit for bit."""
        self._adapt()
        if not self.coeff or not self.error:
            yield
            return
        parameters = list(self._parameters.items())
        values = [p.detach() for _, p in parameters]
        if not self._kept:
            self._kept = [torch.empty_like(v) for v in values]
        torch._foreach_copy_(self._kept, values)
        held = [(v, _shaped(self.error[n], v)) for (n, _), v in zip(parameters, values, strict=True) if n in self.error]
        torch._foreach_add_([v for v, _ in held], [e for _, e in held], alpha=-self.coeff)
        try:
            yield
        finally:
            torch._foreach_copy_(values, self._kept)

    def state_dict(self) -> dict[str, Any]:
        """This rank's residual and momentum by parameter name, the codec's state and the step; every rank saves its own."""
        self._adapt()
        return {
            "step": self.step,
            "coeff": self.coeff,
            "moments": list(self.moments.now),
            "error": {n: e.clone() for n, e in self.error.items()},
            "velocity": {n: v.clone() for n, v in self.velocity.items()},
            "codec": {k: v.clone() for k, v in self._carried().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take ``state_dict`` back, whatever the buckets are now."""
        self.step = int(state["step"])
        if self.adaptive:
            self.coeff, self.moments = float(state["coeff"]), Moments(*state["moments"])
        self.error = {n: e.clone() for n, e in state["error"].items()}
        self.velocity = {n: v.clone() for n, v in state["velocity"].items()}
        self.codec.load_state(state["codec"])
        self._buckets, self._seen = {}, {}

    @staticmethod
    def mean_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state that each rank of another number of ranks takes: the mean, which keeps the virtual point."""

        def mean(part: str) -> dict[str, Tensor]:
            return {n: torch.stack([s[part][n] for s in states]).mean(0) for n in states[0][part]}

        return {**states[0], "error": mean("error"), "velocity": mean("velocity")}

    def run(self, given: Any) -> Any:
        """One bucket (``torch.distributed.GradBucket``): a future of the reduced gradients."""
        future = self._start(given)
        if not self.overlap or given.is_last():
            self._finish()
        return future if self.overlap else collectives.finished(future.wait())

    def _start(self, given: Any) -> Any:
        bucket = self._bucket(given)
        lr = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else 1.0
        scale = lr if self.error_feedback else 1.0
        message = bucket.message(given.buffer(), scale, self.momentum)
        if scale:
            return self._send(given, bucket.codec, message, scale)
        owed = message.clone()
        future = self._send(given, bucket.codec, message, scale)
        message.copy_(owed)  # the parameters do not move at rate 0, so what was sent is still owed
        return future

    def _send(self, given: Any, codec: Codec, message: Tensor, scale: float) -> Any:
        """Start to send ``message``, which becomes its residual; a future of the mean divided by ``scale`` (0: zero), in the buffer."""
        rank, count = collectives.world()
        buffer, length, feed = given.buffer(), message.numel(), self.error_feedback
        key = Key(self.seed, "hook", self.step)
        cut = self._cut(codec, length, count)
        self.bits += 0 if cut else codec.payload_bits(length) + 32 * self.adaptive
        if given.is_last():
            self.step += 1

        def hand_over(mean: Tensor) -> Tensor:
            return buffer.copy_(mean.div_(scale)) if scale else buffer.zero_()

        if codec.collective:
            work = message if feed else message.clone()
            return collectives.finished(hand_over(codec.reduce([work], lambda tensors: collectives.average(tensors[0]), key)))
        if codec.dense:
            values = message.clone()
            if feed:
                message.zero_()
            return collectives.start_sum(values).then(lambda done: hand_over(done.value()[0].div_(count)))
        if codec.shared_support:
            check_finite(message, length)  # all of it: what is not sent now stays in the residual
            values = codec.take(message, key)  # type: ignore[attr-defined]
            at = codec.positions(length, key, message.device)  # type: ignore[attr-defined]
            if feed:
                message[at] -= values
            factor = 1.0 / (count * scale) if scale else 0.0
            if self.adaptive:
                values = torch.cat([values, torch.linalg.vector_norm(values).square().view(1)])

            def place(done: Any) -> Tensor:
                total = done.value()[0]
                if self.adaptive:
                    power, total = float(total[-1]) / count, total[:-1]
                    self._seen[codec.layout[0].name] = (float(torch.linalg.vector_norm(total).square()) / count**2, power)
                buffer.zero_()
                buffer[at] = total.mul_(factor).to(buffer.dtype)
                return buffer

            return collectives.start_sum(values).then(place)
        if cut:
            return self._in_two(codec, message, key, hand_over)
        payload = codec.encode(message, key.fold(worker=rank))
        if feed:
            message.sub_(codec.decode(payload))
        future, everyone = collectives.start_gather(payload.data)

        def decode(done: Any) -> Tensor:
            total = codec.decode(Payload(everyone[0].contiguous(), length))
            for row in everyone[1:]:
                total.add_(codec.decode(Payload(row.contiguous(), length)))
            return hand_over(codec.combine(total.div_(count)))

        return future.then(decode)

    def _cut(self, codec: Codec, length: int, count: int) -> bool:
        if codec.dense:
            return False
        if self.mode == "auto":
            return choose(codec, length, count, self.link, again=not self.error_feedback)[0] == "alltoall"
        return self.mode == "alltoall"

    def _in_two(self, codec: Codec, message: Tensor, key: Key, hand_over: Callable[[Tensor], Tensor]) -> Any:
        """Scatter-reduce with requantization: this starts the first half; the next bucket, or the end, starts the second."""
        self._finish()
        rank, count = collectives.world()
        parts = shards(codec, message.numel(), count)
        sizes = [codec.payload_bits(b - a) // 8 for a, b in parts]
        self.bits += 8 * sum(sizes)  # the shards of the others, and the mean of its own
        sent = [codec.encode(message[a:b], key.fold(stream=f"shard{j}", worker=rank)).data for j, (a, b) in enumerate(parts)]
        work, received = collectives.start_all_to_all(sent)
        done: torch.futures.Future[Tensor] = torch.futures.Future()

        def second() -> None:
            work.wait()
            a, b = parts[rank]
            total = codec.decode(Payload(received[0].contiguous(), b - a))
            for row in received[1:]:
                total.add_(codec.decode(Payload(row.contiguous(), b - a)))
            mean = codec.combine(total.div_(count))
            own = codec.encode(mean, key.fold(stream="again", worker=rank)).data
            padded = own.new_zeros(max(sizes))
            padded[: own.numel()] = own
            future, everyone = collectives.start_gather(padded)

            def place(_: Any) -> None:
                pieces = zip(everyone, sizes, parts, strict=True)
                done.set_result(hand_over(torch.cat([codec.decode(Payload(row[:n].clone(), b - a)) for row, n, (a, b) in pieces])))

            future.then(place)

        self._second = second
        return done

    def _finish(self) -> None:
        """Start the second half of the bucket whose first half is under way, if there is one."""
        second, self._second = self._second, None
        if second is not None:
            second()

    def _adapt(self) -> None:
        """The coefficient after a step whose buckets have all come back."""
        if self._seen:
            common, power = (sum(part) for part in zip(*(self._seen[name] for name in sorted(self._seen)), strict=True))
            self._seen = {}
            self.coeff = self.moments.add(common, power)

    def _carried(self) -> dict[str, Tensor]:
        """The codec's state by tensor name, from all buckets."""
        return {**self.codec.state(), **{k: v for bucket in self._buckets.values() for k, v in bucket.codec.state().items()}}

    def _bucket(self, given: Any) -> Bucket:
        named = [(self._names[id(p)], p) for p in given.parameters()]
        names = tuple(n for n, _ in named)
        if names not in self._buckets:
            layout = slices(named)
            codec = type(self.codec)(self.codec.options, collectives.world()[1])
            codec.layout = layout
            self.codec.load_state(self._carried())  # what buckets about to go have learnt
            codec.load_state({name: value for name, value in self.codec.state().items() if name in names})
            device = given.buffer().device
            error = _join(self.error, layout, device) if self.error_feedback else None
            velocity = _join(self.velocity, layout, device) if self.momentum else None
            held = set(names)
            self._buckets = {k: b for k, b in self._buckets.items() if not held & set(k)}  # buckets were rebuilt
            self._buckets[names] = Bucket(codec, error, velocity)
        return self._buckets[names]


class Bucket:
    """The codec of one bucket's tensors, and flat state whose parts are views in the hook's dictionaries."""

    def __init__(self, codec: Codec, error: Tensor | None, velocity: Tensor | None) -> None:
        self.codec, self.error, self.velocity = codec, error, velocity

    def message(self, gradient: Tensor, lr: float, momentum: float) -> Tensor:
        """What is to be sent, float32: the residual with the new update added, or the update alone."""
        update = gradient.float()
        if self.velocity is not None:
            update = self.velocity.mul_(momentum).add_(update)
        return update if self.error is None else self.error.add_(update, alpha=lr)


def slices(named: Sequence[tuple[str, Tensor]]) -> list[Slice]:
    """The layout of named tensors laid end to end."""
    found, at = [], 0
    for name, tensor in named:
        found.append(Slice(name, tuple(tensor.shape), at, at + tensor.numel()))
        at += tensor.numel()
    return found


def _join(parts: dict[str, Tensor], layout: Sequence[Slice], device: torch.device) -> Tensor:
    """One flat vector of the parts (zero where there is none yet), which become views of it."""
    flat = torch.zeros(layout[-1].stop, device=device)
    for part in layout:
        view = flat[part.start : part.stop]
        if part.name in parts:
            view.copy_(parts[part.name])
        parts[part.name] = view
    return flat


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """``flat`` in the shape of ``like``. DDP lays a dense parameter (channels last, say) into its bucket as it lies in memory."""
    dense = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) == like.numel()
    return flat.as_strided(like.shape, like.stride()) if dense else flat.view(like.shape)
