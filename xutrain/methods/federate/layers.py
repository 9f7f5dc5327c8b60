"""Which parts of a flat vector stay with their client: parameters chosen by the patterns of their names.

Patterns are those of file names ("model.2.*", "*norm*"), matched against the model's parameter names; ``xutrain ls`` has no list of
these, an unknown pattern's error shows the first ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from xutrain.errors import Issue, RecipeError
from xutrain.methods.federate.base import Federation

#: parameters of the norm layers of torch, MONAI ("adn.N") and this package's models
NORMS = ("*norm*", "*bn*", "*.N.weight", "*.N.bias")


def last_layer(federation: Federation) -> tuple[str, ...]:
    """A pattern for the parameters of the last layer, by its name."""
    name = federation.names[-1][0]
    return (f"{name.rpartition('.')[0]}.*",) if "." in name else (name,)


def chosen(federation: Federation, patterns: Iterable[str]) -> list[tuple[str, int, int]]:
    """Name, start and stop of every parameter that a pattern matches."""
    wanted = tuple(patterns)
    return [part for part in federation.names if any(fnmatchcase(part[0], p) for p in wanted)]


def mask(federation: Federation, patterns: Sequence[str], where: str, like: Tensor) -> Tensor:
    """1 where a parameter matches, 0 elsewhere, shape (D,).

    Without names (problems in memory) the last fifth of the vector is taken.

    Raises:
        RecipeError: nothing, or everything, matches.
    """
    found = torch.zeros_like(like)
    if not federation.names:
        found[len(like) - max(1, len(like) // 5) :] = 1
        return found
    parts = chosen(federation, patterns)
    if not parts or len(parts) == len(federation.names):
        names = [name for name, _, _ in federation.names]
        shown = ", ".join(names[:3] + (["..."] if len(names) > 4 else []) + names[-1:])
        raise RecipeError(
            Issue(where, f"matches {'no' if not parts else 'every'} parameter of the model", list(patterns), f"parameters: {shown}")
        )
    for _, start, stop in parts:
        found[start:stop] = 1
    return found
