"""What a codec answers: a vector becomes bytes, the bytes become a vector.

``encode`` returns exactly what crosses the wire. The receiver knows the codec's options and the vector's length; nothing
else travels beside ``Payload.data``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.errors import Issue, XutrainError
from xutrain.registry import Named


@dataclass(frozen=True)
class Payload:
    """An encoded vector.

    Attributes:
        data: uint8 of shape (bytes,), all that is sent.
        length: number of elements of the vector, known to the receiver.
    """

    data: Tensor
    length: int

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
    """

    biased: bool = False
    contractive: bool = False
    random: bool = False
    shared_support: bool = False

    class Options(Named):
        pass

    def __init__(self, options: Any, workers: int = 1) -> None:
        """``options`` is an instance of this class's ``Options``; ``workers`` is how many messages are averaged."""
        self.options = options
        self.workers = workers

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        """Encode a float32 vector of shape (n,).

        Raises:
            NonFinite: the vector holds NaN or infinity; names the bucket.
        """
        raise NotImplementedError

    def decode(self, payload: Payload) -> Tensor:
        """The float32 vector of shape (payload.length,) that the payload stands for."""
        raise NotImplementedError

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


def check_finite(vector: Tensor, bucket: int) -> None:
    """Refuse NaN and infinity before levels are searched, naming the first bucket that holds one."""
    if not bool(torch.isfinite(vector.sum())) and not bool(torch.isfinite(vector).all()):
        bad = int(torch.nonzero(~torch.isfinite(vector))[0])
        raise NonFinite(Issue(f"bucket {bad // max(bucket, 1)}", f"element {bad} of the vector is not finite", float(vector[bad])))
