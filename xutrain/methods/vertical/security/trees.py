"""Sums over two trees, and the audit that says what a coalition learns from them.

The paper's scheme: party l sends m_l = z_l + b_l up tree T1 and the mask b_l up tree T2; the requester subtracts the two sums. T1 and T2
must be "totally different": no subtree with more than one leaf in common. That is not enough when parties are inner nodes: a
party that gets the same set's sum in both trees subtracts them. So each pair of trees is audited by linear algebra, and a pair
from which one party alone learns something is refused.

A tree is a list of parents, -1 for the root. The requester is the root of T1; the root of T2 sends its sum to the requester.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from xutrain.errors import Issue, RecipeError

Parents = list[int]

#: Pairs found by search: no single party learns anything, nor do two (nor three for q = 4).
KNOWN: dict[int, tuple[Parents, Parents]] = {
    4: ([-1, 2, 0, 2], [1, 3, 3, -1]),
    5: ([-1, 2, 0, 2, 3], [1, 3, 4, -1, 1]),
    6: ([-1, 0, 1, 4, 1, 3], [3, 5, -1, 2, 2, 2]),
    8: ([-1, 0, 1, 1, 3, 2, 2, 4], [5, 7, 7, 0, 6, 6, 7, -1]),
}


def chain(q: int) -> Parents:
    """q-1 -> ... -> 1 -> 0."""
    return [p - 1 for p in range(q)]


def reversed_chain(q: int) -> Parents:
    """1 -> 2 -> ... -> q-1 -> 0."""
    return [-1, *range(2, q), 0] if q > 1 else [-1]


def star(q: int, root: int = 0) -> Parents:
    """Everybody sends to the root."""
    return [-1 if p == root else root for p in range(q)]


def binomial(order: list[int]) -> Parents:
    """The binomial tree over ``order`` (a permutation of the parties; the first is the root), depth ceil(log2 q)."""
    parents = [-1] * len(order)
    for at in range(1, len(order)):
        parents[order[at]] = order[at & (at - 1)]  # clear the lowest bit: 1 sends to 0, 3 to 2, 2 to 0, ...
    return parents


def check(parents: Parents, where: str) -> None:
    """Raises RecipeError where a list of parents is no tree."""
    q = len(parents)
    roots = [p for p in range(q) if parents[p] == -1]
    ok = len(roots) == 1 and all(-1 <= a < q for a in parents)
    for p in range(q if ok else 0):
        seen = set()
        while parents[p] != -1 and p not in seen:
            seen.add(p)
            p = parents[p]
        ok = ok and parents[p] == -1
    if not ok:
        raise RecipeError(Issue(where, "is not a tree: give each party's parent, -1 for the one root", parents))


def depth(parents: Parents) -> int:
    """Hops from the deepest party to the root."""

    def hops(p: int) -> int:
        return 0 if parents[p] == -1 else 1 + hops(parents[p])

    return max(hops(p) for p in range(len(parents)))


def _subtrees(parents: Parents) -> list[set[int]]:
    q = len(parents)
    under: list[set[int]] = [{p} for p in range(q)]
    for p in range(q):
        a = parents[p]
        while a != -1:
            under[a].add(p)
            a = parents[a]
    return under


def leak(t1: Parents, t2: Parents, coalition: Iterable[int], requester: int = 0) -> int:
    """How many combinations of private products the coalition learns beyond the ideal: its own and, with the requester, the total.

    The coalition sees its members' z and b, each message of either tree into a member, and, with the requester, the sum of the masks.
    """
    q, members = len(t1), set(coalition)
    rows: list[np.ndarray] = []

    def see(z: Iterable[int], b: Iterable[int]) -> None:
        row = np.zeros(2 * q)
        row[list(z)] = 1.0
        row[[q + p for p in b]] = 1.0
        rows.append(row)

    for p in members:
        see([p], [])
        see([], [p])
    for parents, masked in ((t1, True), (t2, False)):
        under = _subtrees(parents)
        for p in range(q):
            if parents[p] in members:
                see(under[p] if masked else [], under[p])
    if requester in members:
        see([], range(q))  # the sum of the masks, whoever is the root of T2
    seen = np.array(rows)
    free = np.linalg.matrix_rank(seen) - np.linalg.matrix_rank(seen[:, q:])  # combinations without any mask
    own = np.eye(q)[sorted(members)]
    ideal = np.linalg.matrix_rank(np.vstack([own, np.ones((1, q))]) if requester in members else own)
    return int(free - ideal)


def smallest_breaking(t1: Parents, t2: Parents, requester: int = 0, up_to: int = 3) -> tuple[int, ...] | None:
    """The smallest coalition (at most ``up_to`` parties) that learns more than the ideal; None where there is none."""
    for size in range(1, min(up_to, len(t1)) + 1):
        for coalition in combinations(range(len(t1)), size):
            if leak(t1, t2, coalition, requester) > 0:
                return coalition
    return None


@dataclass(frozen=True)
class TreePair:
    """An accepted pair. ``breaking`` is the smallest coalition found that learns more than the ideal, up to three parties."""

    t1: Parents
    t2: Parents
    breaking: tuple[int, ...] | None

    @property
    def hops(self) -> int:
        """Messages in a row until the requester has both sums."""
        return max(depth(self.t1), depth(self.t2) + (self.t2[0] != -1))

    @property
    def messages(self) -> int:
        """Messages of one sum: q-1 in each tree, and one more where T2 has another root."""
        return 2 * (len(self.t1) - 1) + (self.t2[0] != -1)


def pair(kind: str, q: int, t1: Parents | None = None, t2: Parents | None = None) -> TreePair:
    """The audited pair of trees for q parties, requester 0 (other requesters: rotate the parties).

    ``kind``: "auto" (a known good pair, else the two chains), "chain", "same_star", "binomial", or "given" with ``t1`` and ``t2``.
    Raises RecipeError where one party alone learns something, or where q < 3, for which no sum hides anything.
    """
    if q < 3:
        raise RecipeError(
            Issue(
                "security.mode",
                f"trees cannot hide anything among {q} parties: the total minus one's own is the other's",
                "tree",
                "security.mode=plain, and know it",
            )
        )
    if kind == "given":
        if t1 is None or t2 is None or len(t1) != q or len(t2) != q:
            raise RecipeError(Issue("security.trees", f"t1 and t2 must list {q} parents each", {"t1": t1, "t2": t2}))
        chosen = (t1, t2)
    elif kind == "auto" and q in KNOWN:
        chosen = KNOWN[q]
    elif kind in ("auto", "chain"):
        chosen = (chain(q), reversed_chain(q))
    elif kind == "same_star":
        chosen = (star(q), star(q))
    else:
        chosen = (binomial(list(range(q))), binomial([0, *range(q - 1, 0, -1)]))
    check(chosen[0], "security.t1")
    check(chosen[1], "security.t2")
    if chosen[0][0] != -1:
        raise RecipeError(Issue("security.t1", "party 0 must be the root of the first tree (it stands for the requester)", chosen[0]))
    breaking = smallest_breaking(*chosen)
    if breaking is not None and len(breaking) == 1:
        what = f"party {breaking[0]} alone learns others' products from this pair of trees"
        raise RecipeError(
            Issue("security.trees", what, {"t1": chosen[0], "t2": chosen[1]}, "security.trees=auto, or security.mode=pairwise")
        )
    return TreePair(*chosen, breaking)
