"""PowerSGD's rank-r factors (Vogels, Karimireddy, Jaggi, NeurIPS 2019), with warm start, as the DEF authors' RankK computes them.

    P = orth(mean_k M^k Q);   Q^k = M^kT P;   Q <- mean_k Q^k
    sent: P Q^T;   residual of worker k: M^k - P Q^kT

Tensors of two and more dimensions are matrices M (n0, rest), r = min(rank, n0, rest); orth is Gram-Schmidt. Two dependent all-reduces;
everything else is all-reduced as it is. Q starts seeded and equal everywhere; its directions are kept from one exchange to the next
(``warm_start``), of unit length, so that no size of M is special (the authors add 1e-8 in orth). A message alone (``encode``) is one
such iteration of one worker from a seeded Q.

Limits: tensors of one dimension come back exactly; so does a mean matrix M of rank r or less whose M Q has the same rank, up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from xutrain.engine.replica import Slice
from xutrain.engine.rng import Key
from xutrain.methods.codecs.base import Codec, Payload, as_vector, check_finite
from xutrain.registry import Named, codec


class Matrix(NamedTuple):
    """A tensor as rows x columns with rank r (0: sent as it is)."""

    name: str
    start: int
    rows: int
    columns: int
    rank: int

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


@codec(
    "low_rank",
    paper="1905.13727",
    summary="baseline: PowerSGD's rank-r factors with warm start, all-reduced",
    aliases=("rank_k",),
    verbs=("sparsify",),
)
class LowRank(Codec):
    biased = True
    contractive = True
    per_tensor = True
    collective = True

    class Options(Named):
        name: str = "low_rank"
        rank: int = Field(1, ge=1, le=4096, description="Rank of the factors.")
        warm_start: bool = Field(True, description="Start from the last exchange's factor instead of a new random one.")

    def __init__(self, options: Any, workers: int = 1) -> None:
        super().__init__(options, workers)
        self.factors: dict[str, Tensor] = {}

    @property
    def label(self) -> str:
        return f"low-rank-{self.options.rank}" + ("" if self.options.warm_start else "-cold")

    def matrices(self, length: int) -> list[Matrix]:
        """All tensors, those with rank 0 as one column."""
        return [self._matrix(part) for part in self.tensors(length)]

    def _matrix(self, part: Slice) -> Matrix:
        if len(part.shape) < 2:
            return Matrix(part.name, part.start, part.numel, 1, 0)
        columns = part.numel // part.shape[0]
        return Matrix(part.name, part.start, part.shape[0], columns, min(self.options.rank, part.shape[0], columns))

    def reduce(self, vectors: Sequence[Tensor], average: Callable[[list[Tensor]], Tensor], key: Key) -> Tensor:
        """The mean that all workers agree on; every vector becomes its residual.

        Args:
            vectors: one of shape (D,) per hosted worker.
            average: the mean over all workers of one flat vector per hosted worker (one all-reduce).
            key: seeds Q where there is none yet.
        """
        length = vectors[0].numel()
        parts = self.matrices(length)
        low = [p for p in parts if p.rank]
        q = [self._start(p, key, vectors[0]) for p in low]
        plain = [torch.cat([p.of(v).reshape(-1) for p in parts if not p.rank] or [v.new_empty(0)]) for v in vectors]
        for v in vectors:
            check_finite(v, max(1, length))
        first = average(
            [
                torch.cat([(p.of(v) @ f).view(-1) for p, f in zip(low, q, strict=True)] + [rest])
                for v, rest in zip(vectors, plain, strict=True)
            ]
        )
        left = [orthonormal(f) for f in _split(first, [(p.rows, p.rank) for p in low])]
        mine = [[p.of(v).t() @ f for p, f in zip(low, left, strict=True)] for v in vectors]
        right = _split(
            average([torch.cat([f.reshape(-1) for f in row] or [v.new_empty(0)]) for row, v in zip(mine, vectors, strict=True)]),
            [(p.columns, p.rank) for p in low],
        )
        mean = torch.empty_like(vectors[0])
        at = first.numel() - plain[0].numel()
        for p in parts:
            if not p.rank:
                p.of(mean).copy_(first[at : at + p.rows].view(p.rows, 1))
                at += p.rows
                for v in vectors:
                    p.of(v).zero_()
        for i, p in enumerate(low):
            torch.matmul(left[i], right[i].t(), out=p.of(mean))
            for v, factors in zip(vectors, mine, strict=True):
                p.of(v).sub_(left[i] @ factors[i].t())
            if self.options.warm_start:  # a column without a message keeps its direction: zero would never come alive again
                norm = right[i].norm(dim=0)
                self.factors[p.name] = torch.where(norm > 0, right[i] / norm, q[i])
        return mean

    def _start(self, p: Matrix, key: Key, like: Tensor) -> Tensor:
        known = self.factors.get(p.name)
        if known is not None and known.shape == (p.columns, p.rank):  # another run's, which this one goes on from, may have another rank
            return known.to(like)
        generator = key.fold(stream=f"q/{p.name}", step=0 if self.options.warm_start else key.step, worker=0).generator()
        return torch.randn(p.columns, p.rank, generator=generator).to(like)

    def state(self) -> dict[str, Tensor]:
        return dict(self.factors)

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.factors = dict(state)

    def encode(self, vector: Tensor, key: Key | None = None) -> Payload:
        sent: list[Tensor] = []
        alone = LowRank(self.options)
        alone.lay(self.layout)
        vector = as_vector(vector)
        if vector.numel():
            alone.reduce([vector.clone()], lambda tensors: sent.append(tensors[0]) or tensors[0], key or Key())  # type: ignore[func-returns-value]
        data = torch.cat(sent) if sent else vector.new_empty(0)
        return Payload(data.view(torch.uint8) if data.numel() else data.to(torch.uint8), vector.numel())

    def decode(self, payload: Payload) -> Tensor:
        out = torch.zeros(payload.length, device=payload.data.device)
        data = self.received(payload)
        if not payload.length:
            return out
        parts = self.matrices(payload.length)
        low = [p for p in parts if p.rank]
        numbers = data.view(torch.float32)
        left = [orthonormal(f) for f in _split(numbers, [(p.rows, p.rank) for p in low])]
        at = sum(p.rows * p.rank for p in low)
        for p in parts:
            if not p.rank:
                p.of(out).copy_(numbers[at : at + p.rows].view(p.rows, 1))
                at += p.rows
        for p, a, b in zip(low, left, _split(numbers[at:], [(p.columns, p.rank) for p in low]), strict=True):
            p.of(out).copy_(a @ b.t())
        return out

    def payload_bits(self, length: int) -> int:
        return 32 * sum((p.rows + p.columns) * p.rank if p.rank else p.rows for p in self.matrices(length))


def _split(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    found, at = [], 0
    for rows, columns in shapes:
        found.append(flat[at : at + rows * columns].view(rows, columns))
        at += rows * columns
    return found


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span (rows, r): Gram-Schmidt, each column projected twice. Returns a new tensor.

    A column that lies in the span of those before it, to the precision of its type, becomes zero: what is left of it is rounding
    noise, which would be a direction of its own on every machine.
    """
    done = torch.empty_like(matrix)
    least = 128 * torch.finfo(matrix.dtype).eps
    for i in range(matrix.shape[1]):
        before, column = done[:, :i], matrix[:, i]
        floor = least * column.norm()
        for _ in range(2 if i else 0):
            column = column - before @ (before.t() @ column)
        norm = column.norm()
        done[:, i] = torch.where(norm > floor, column / norm, 0.0)
    return done
