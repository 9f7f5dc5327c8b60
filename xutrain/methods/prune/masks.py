"""From scores to masks. A mask is bool, True where a weight is kept; every function is pure.

Ties go to the lowest column index (a stable ascending sort), as in Wanda's code; arXiv:2410.12013, Algorithm 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xutrain.errors import RecipeError
from xutrain.models.shards import Source, write_checkpoint


@dataclass(frozen=True)
class Pattern:
    """How much of a matrix goes, and inside which group.

    ``keep``/``of`` None: unstructured, the fraction ``sparsity`` of each group. Else ``keep`` of every ``of`` consecutive
    inputs of a row stay (the hardware's reading of n:m: 2:4 keeps two of four, 1:4 keeps one of four).
    """

    sparsity: float = 0.5
    keep: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, text: str, sparsity: float = 0.5, where: str = "pattern") -> Pattern:
        """``unstructured`` with a sparsity, or ``n:m``. Raises RecipeError for anything else."""
        if text == "unstructured":
            if not 0 <= sparsity <= 1:
                raise RecipeError.at("sparsity", "must lie between 0 and 1", value=sparsity, hint="the share of weights that goes")
            return cls(sparsity)
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 0 <= int(match[1]) <= int(match[2]) or int(match[2]) == 0:
            raise RecipeError.at(where, "unstructured, or kept:group with kept <= group", value=text, hint='for example pattern: "2:4"')
        keep, of = int(match[1]), int(match[2])
        return cls(1 - keep / of, keep, of)

    @property
    def name(self) -> str:
        return "unstructured" if self.of is None else f"{self.keep}:{self.of}"

    def check(self, columns: int, where: str) -> None:
        """Raises RecipeError when the groups of n:m do not fill a row of ``columns`` inputs."""
        if self.of is not None and columns % self.of:
            hint = f"choose a group size that divides {columns}, or pattern=unstructured"
            raise RecipeError.at(
                "pattern", f"{where} has {columns} inputs, which is not a multiple of {self.of}", value=self.name, hint=hint
            )


def row_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """Per row, all but the floor(d_in p) lowest scores; or n:m. ``score`` (rows, d_in) gives a bool mask of that shape."""
    if pattern.of is not None:
        return _nm_mask(score, pattern)
    columns = score.shape[1]
    drop = int(columns * pattern.sparsity + 1e-9)  # 0.1 * 30 is 3, not 2.999
    mask = torch.ones_like(score, dtype=torch.bool)
    if drop == 0:
        return mask
    if drop == columns:
        return ~mask
    # The drop-th smallest value of each row decides; a sort of the row is only needed to break ties.
    threshold = _kth_smallest(score, drop)
    mask = score > threshold
    if kept(mask) != len(score) * (columns - drop):  # rows where several weights equal the threshold keep too few
        excess = mask.sum(1) - (columns - drop)
        tied = score == threshold
        spare = (-excess).unsqueeze(1)  # how many of the tied ones stay: the last ones in column order
        from_right = tied.flip(1).cumsum(1).flip(1)
        mask |= tied & (from_right <= spare)
    return mask


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """The k-th smallest value of every row, (rows, 1). numpy's selection is vectorised: ten times faster than kthvalue."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(score.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return torch.kthvalue(score, k, dim=1, keepdim=True).values


def _nm_mask(score: Tensor, pattern: Pattern) -> Tensor:
    assert pattern.keep is not None and pattern.of is not None
    rows, columns = score.shape
    pattern.check(columns, "a matrix")
    size, drop = pattern.of, pattern.of - pattern.keep
    if size > 8:
        order = score.view(rows, columns // size, size).argsort(dim=2, stable=True)
        stay = torch.arange(size, device=score.device) >= drop
        return torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, stay.expand_as(order)).view(rows, columns)
    # The rank of each member of a small group by comparing all pairs, groups side by side; equal ones rank in column order.
    members = score.reshape(-1, size).T.contiguous()
    rank = torch.zeros_like(members, dtype=torch.uint8)
    for j in range(size):
        for i in range(j):
            later = members[i] <= members[j]
            rank[j] += later
            rank[i] += ~later
    return (rank >= drop).T.reshape(rows, columns)


def matrix_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """One threshold for the whole matrix: the value at sorted position int(numel p), inclusive, so that at least one weight
    more than int(numel p) goes (Wanda's magnitude baseline). n:m as in ``row_mask``."""
    if pattern.of is not None:
        return _nm_mask(score, pattern)
    drop = int(score.numel() * pattern.sparsity + 1e-9)
    if drop == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if drop >= score.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    return score > _kth_smallest(score.reshape(1, -1), drop + 1)


def kept(mask: Tensor) -> int:
    """How many weights a mask keeps."""
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else mask.sum())


def sparsity(mask: Tensor) -> float:
    """Fraction of weights that a mask drops."""
    return 1 - kept(mask) / mask.numel()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep(weight: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """``weight`` where the mask is True, +0 elsewhere, into ``out`` (may be ``weight`` itself) or a new tensor.

    An integer product of the bit patterns with 0 or 1: exact for every dtype, and many times faster than a selection.
    """
    if weight.device.type != "cpu" or mask.device.type != "cpu" or not weight.is_contiguous() or not mask.is_contiguous():
        found = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return found if out is None else out.copy_(found)
    out = torch.empty_like(weight) if out is None else out
    bits = _BITS[weight.element_size()]
    np.multiply(weight.detach().view(bits).numpy(), mask.view(torch.int8).numpy(), out=out.detach().view(bits).numpy())
    return out


def _file(folder: Path, layer: int, expert: int) -> Path:
    return folder / f"layer-{layer:04d}-expert-{expert:04d}"


def write_masks(folder: Path, layer: int, expert: int, masks: Mapping[str, Tensor]) -> None:
    """Keep the masks of one expert, one bit a weight."""
    packed = {role: torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1)) for role, mask in masks.items()}
    write_checkpoint(_file(folder, layer, expert), packed, {"layer": layer, "expert": expert})


def read_masks(folder: Path, layer: int, expert: int, columns: Mapping[str, int]) -> dict[str, Tensor]:
    """The masks of one expert; ``columns`` says how many inputs each role has."""
    source = Source(_file(folder, layer, expert))
    found = {}
    for role, count in columns.items():
        bits = np.unpackbits(source.read(role).numpy(), axis=1, count=count)
        found[role] = torch.from_numpy(bits).bool()
    source.close()
    return found
