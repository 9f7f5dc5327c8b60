"""What a codec answers: a vector becomes bytes, the bytes become a vector.

``encode`` returns exactly what crosses the wire. The receiver knows the codec's options and the vector's length; nothing
else travels beside ``Payload.data``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.errors import Issue, UsageError, XutrainError
from xutrain.registry import Named


@dataclass(frozen=True)
class Payload:
    """An encoded vector.

    Attributes:
        data: uint8 of shape (bytes,), all that is sent.
        length: number of elements of the vector, known to the receiver.
        key: the draw that all workers share, known to the receiver, where the codec has a shared support; else None.
    """

    data: Tensor
    length: int
    key: Key | None = None

    @property
    def bits(self) -> int:
        """What the payload costs on the wire."""
        return 8 * self.data.numel()


class NonFinite(XutrainError, ValueError):
    """A vector with NaN or infinity was given to a codec (exit code 4)."""

    exit_code = 4


class Codec:
    """Base of all codecs.

    Class attributes (an instance may override them where its options change the answer):
        biased: the decoded vector's expectation differs from the vector.
        contractive: E||v - Q(v)||^2 < ||v||^2 for every v != 0, which error feedback needs.
        random: encode draws from its key.
        shared_support: all workers send the same coordinates, so that sums of payloads are payloads of sums.
        dense: all elements cross the wire as they are.
        per_tensor: works tensor by tensor, so that the vector must not be cut elsewhere.
        collective: exchanges by ``reduce``, which needs several means in a row, and not by encode and decode.
        expands: E||v - Q(v)||^2 > ||v||^2, for every v or for every small one, so that error feedback diverges.
    """

    biased: bool = False
    contractive: bool = False
    random: bool = False
    shared_support: bool = False
    dense: bool = False
    per_tensor: bool = False
    collective: bool = False
    expands: bool = False
    layout: Sequence[Slice] = ()

    class Options(Named):
        pass

    def __init__(self, options: Any, workers: int = 1) -> None:
        """``options`` is an instance of this class's ``Options``; ``workers`` is how many messages are averaged."""
        self.options = options
        self.workers = workers

    def lay(self, layout: Sequence[Slice]) -> None:
        """Say how tensors lie in the vectors to come. Without it, or for a vector of another length, a vector is one tensor.

        Raises:
            RecipeError: an option does not fit these tensors.
        """
        self.layout = layout

    def tensors(self, length: int) -> Sequence[Slice]:
        """The tensors of a vector of ``length`` elements, but for those that hold none."""
        whole = bool(self.layout) and self.layout[-1].stop == length
        return [part for part in self.layout if part.numel] if whole else [Slice("", (length,), 0, length)] if length else []

    def state(self) -> dict[str, Tensor]:
        """What the codec carries from one exchange to the next, equal on all workers; most carry nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take ``state`` back."""

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        """Encode a float32 vector of shape (n,).

        Raises:
            NonFinite: the vector holds NaN or infinity; names the bucket.
        """
        raise NotImplementedError

    def decode(self, payload: Payload) -> Tensor:
        """The float32 vector of shape (payload.length,) that the payload stands for."""
        raise NotImplementedError

    def reduce(self, vectors: Sequence[Tensor], average: Callable[[list[Tensor]], Tensor], key: Key) -> Tensor:
        """For a collective codec: the common mean of the hosted workers' vectors, each of which becomes its residual.

        ``average`` is the mean over all workers of one flat vector per hosted worker.
        """
        raise NotImplementedError

    def received(self, payload: Payload) -> Tensor:
        """The bytes of ``payload``, placed so that they can be read as numbers.

        Raises:
            UsageError: they are not as many as a vector of ``payload.length`` elements takes.
        """
        data, bits = payload.data, self.payload_bits(payload.length)
        if data.dtype != torch.uint8 or data.dim() != 1 or payload.bits != bits:
            what = f"{self.label} takes {bits // 8} bytes (uint8) for {payload.length} elements"
            raise UsageError(Issue("payload", what, f"{data.dtype}, shape {tuple(data.shape)}", "decode with the options that encoded it"))
        data = data.contiguous()
        return data if data.storage_offset() % 8 == 0 else data.clone()

    def payload_bits(self, length: int) -> int:
        """Closed form of ``encode(v).bits`` for a vector of ``length`` elements."""
        raise NotImplementedError

    def combine(self, mean: Tensor) -> Tensor:
        """What the server makes of the mean of the decoded messages (a majority vote, say); the mean itself by default."""
        return mean

    @property
    def label(self) -> str:
        """Short name with the options that tell variants apart, as tables print it (``orq-9``)."""
        return str(self.options.name)


def as_vector(vector: Tensor) -> Tensor:
    """A contiguous float32 vector that shares memory where it can. Raises UsageError for other shapes and types."""
    if not isinstance(vector, Tensor):
        raise UsageError(Issue("vector", "must be a torch tensor", type(vector).__name__, "torch.as_tensor makes one"))
    if vector.dim() != 1 or not vector.dtype.is_floating_point:
        raise UsageError(
            Issue("vector", "must be a floating-point tensor of one dimension", f"{vector.dtype}, shape {tuple(vector.shape)}")
        )
    return vector.detach().to(torch.float32).contiguous()


def check_finite(vector: Tensor, bucket: int) -> None:
    """Refuse NaN and infinity before levels are searched, naming the first bucket that holds one."""
    if not bool(torch.isfinite(vector.sum())) and not bool(torch.isfinite(vector).all()):
        bad = int(torch.nonzero(~torch.isfinite(vector))[0])
        raise NonFinite(Issue(f"bucket {bad // max(bucket, 1)}", f"element {bad} of the vector is not finite", float(vector[bad])))
