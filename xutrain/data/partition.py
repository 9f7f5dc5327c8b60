"""How a training set is dealt to clients. Each rule is a part, so that any data set takes any of them.

A rule gets the samples' labels and sites and a keyed generator, and returns one array of sample indices per client. Every
index is dealt exactly once. Torch-free, so that `xutrain data partition` and validation stay quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from xutrain.errors import Issue, RecipeError
from xutrain.registry import Named, partition

Parts = list[np.ndarray]


@dataclass(frozen=True)
class Samples:
    """What a rule may know of the training set.

    Attributes:
        count: number of samples N.
        labels: int64 of shape (N,), or None where the task has no classes.
        sites: int64 of shape (N,), or None where samples have no natural owner.
    """

    count: int
    labels: np.ndarray | None = None
    sites: np.ndarray | None = None

    def classes(self, rule: str) -> np.ndarray:
        """The labels. Raises RecipeError where the task has none."""
        if self.labels is None:
            raise RecipeError(Issue("partition.name", "deals by class, but this data set has no classes", rule, "use iid or by_site"))
        return self.labels


@partition(
    "similarity",
    summary="a share s dealt at random, the rest sorted by label (the rule of the DOMO paper, after SCAFFOLD)",
    aliases=("data_similarity",),
)
class Similarity:
    """Permute all indices; the first round(s N) are dealt in K near-equal parts; the rest, stably sorted by label, in K
    contiguous near-equal parts; client k has part k of both. Sizes differ by at most 2. s = 1 is iid; s = 0 gives a client
    one or two classes when classes are larger than shares. Source: arXiv 2102.03970 (after arXiv 1910.06378)."""

    class Options(Named):
        name: Literal["similarity"] = "similarity"
        s: float = Field(0.1, ge=0, le=1, description="Share of the data that is dealt at random; 0 sorts everything by label.")

    @staticmethod
    def deal(options: Any, samples: Samples, clients: int, rng: np.random.Generator) -> Parts:
        labels = samples.classes("similarity")
        order = rng.permutation(samples.count)
        cut = round(options.s * samples.count)
        rest = order[cut:]
        rest = rest[np.argsort(labels[rest], kind="stable")]
        pairs = zip(np.array_split(order[:cut], clients), np.array_split(rest, clients), strict=True)
        return [np.concatenate(pair) for pair in pairs]


@partition("iid", summary="dealt at random in near-equal parts", aliases=("random",))
class Iid:
    """A random permutation cut in K near-equal parts."""

    class Options(Named):
        name: Literal["iid"] = "iid"

    @staticmethod
    def deal(options: Any, samples: Samples, clients: int, rng: np.random.Generator) -> Parts:
        return np.array_split(rng.permutation(samples.count), clients)


@partition("dirichlet", summary="each class dealt by a Dirichlet draw, full clients passed over (the FedMA rule)")
class Dirichlet:
    """For every class: shuffle its indices, draw p ~ Dir(alpha 1_K), set p_k to 0 for clients that already hold N/K samples
    or more, renormalise, cut at floor(cumsum(p) n_c). Drawn again until the smallest client has ``min_size`` samples.
    Source: FedMA (ICLR 2020); the procedure of Auto-FedRL's public code. Large alpha tends to iid."""

    class Options(Named):
        name: Literal["dirichlet"] = "dirichlet"
        alpha: float = Field(0.5, gt=0, description="Concentration; small values give clients few classes.")
        min_size: int = Field(10, ge=0, description="Draw again while a client has fewer samples than this.")
        attempts: int = Field(1000, ge=1, description="Give up after this many draws.")

    @staticmethod
    def deal(options: Any, samples: Samples, clients: int, rng: np.random.Generator) -> Parts:
        labels = samples.classes("dirichlet")
        if clients * options.min_size > samples.count:
            what = f"{clients} clients cannot have that many of {samples.count} samples"
            raise RecipeError(Issue("partition.min_size", what, options.min_size, f"at most {samples.count // clients}"))
        for _ in range(options.attempts):
            parts = Dirichlet.draw(options.alpha, labels, clients, rng)
            if parts is not None and min(map(len, parts)) >= options.min_size:
                return [rng.permutation(part) for part in parts]
        what = f"{options.attempts} draws gave some client fewer than {options.min_size} samples"
        raise RecipeError(Issue("partition.alpha", what, options.alpha, "raise alpha, or lower partition.min_size or clients.count"))

    @staticmethod
    def draw(alpha: float, labels: np.ndarray, clients: int, rng: np.random.Generator) -> Parts | None:
        """One draw; None when the weights of the clients that still have room vanish numerically."""
        held: list[list[np.ndarray]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, dtype=np.int64)
        for label in np.unique(labels):
            mine = rng.permutation(np.flatnonzero(labels == label))
            p = rng.dirichlet(np.full(clients, alpha)) * (sizes < len(labels) / clients)
            if not p.sum() > 0:
                return None
            cuts = np.floor(np.cumsum(p / p.sum()) * len(mine) + 1e-9).astype(np.int64)[:-1]
            for k, part in enumerate(np.split(mine, cuts)):
                held[k].append(part)
                sizes[k] += len(part)
        return [np.concatenate(parts) for parts in held]


@partition("shards", summary="sorted by label, cut in equal shards, a few shards a client")
class Shards:
    """Sort by label, cut in K x per_client contiguous near-equal shards, deal the shards at random. McMahan et al. 2017."""

    class Options(Named):
        name: Literal["shards"] = "shards"
        per_client: int = Field(2, ge=1, description="Shards that each client gets.")

    @staticmethod
    def deal(options: Any, samples: Samples, clients: int, rng: np.random.Generator) -> Parts:
        labels = samples.classes("shards")
        if clients * options.per_client > samples.count:
            what = f"{clients} clients with that many shards each are more shards than {samples.count} samples"
            most = samples.count // clients
            raise RecipeError(Issue("partition.per_client", what, options.per_client, f"at most {most}, or fewer clients"))
        order = rng.permutation(samples.count)
        order = order[np.argsort(labels[order], kind="stable")]
        shards = np.array_split(order, clients * options.per_client)
        given = rng.permutation(len(shards)).reshape(clients, options.per_client)
        return [np.concatenate([shards[i] for i in sorted(row)]) for row in given]


@partition("by_site", summary="each client is one of the data set's own sites (hospital, writer)", aliases=("site",))
class BySite:
    """Client k holds the samples of the k-th site, sites in ascending order of their numbers."""

    class Options(Named):
        name: Literal["by_site"] = "by_site"

    @staticmethod
    def deal(options: Any, samples: Samples, clients: int, rng: np.random.Generator) -> Parts:
        if samples.sites is None:
            raise RecipeError(Issue("partition.name", "this data set has no sites", "by_site", "use similarity, dirichlet, shards or iid"))
        sites = np.unique(samples.sites)
        if len(sites) != clients:
            raise RecipeError(Issue("clients.count", f"the data set has {len(sites)} sites", clients, f"set clients.count={len(sites)}"))
        return [np.flatnonzero(samples.sites == site) for site in sites]


@partition("classes", summary="each client gets a fixed number of classes, equal parts of each")
class Classes:
    """Client k gets classes (k m, ..., k m + m - 1) mod C; a class is cut in near-equal parts among its clients. With
    K m < C some classes have no client, which is an error."""

    class Options(Named):
        name: Literal["classes"] = "classes"
        per_client: int = Field(2, ge=1, description="Classes m that each client gets.")

    @staticmethod
    def deal(options: Any, samples: Samples, clients: int, rng: np.random.Generator) -> Parts:
        labels = samples.classes("classes")
        kinds = np.unique(labels)
        if options.per_client > len(kinds):
            raise RecipeError(Issue("partition.per_client", f"the data set has {len(kinds)} classes", options.per_client, "lower it"))
        wants = [[(k * options.per_client + i) % len(kinds) for i in range(options.per_client)] for k in range(clients)]
        held: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c, kind in enumerate(kinds):
            takers = [k for k in range(clients) if c in wants[k]]
            mine = rng.permutation(np.flatnonzero(labels == kind))
            for k, part in zip(takers, np.array_split(mine, len(takers)) if takers else [], strict=True):
                held[k].append(part)
        return [np.concatenate(parts) if parts else np.empty(0, dtype=np.int64) for parts in held]


def table(parts: Parts, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Samples of every class at every client, int64 of shape (K, C)."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def distance(counts: np.ndarray) -> np.ndarray:
    """Total-variation distance of each client's label law to that of all clients together, shape (K,); 1 for an empty client."""
    whole = counts.sum(axis=0) / max(1, counts.sum())
    sizes = counts.sum(axis=1, keepdims=True)
    own = np.divide(counts, sizes, out=np.zeros(counts.shape), where=sizes > 0)
    return np.where(sizes[:, 0] > 0, 0.5 * np.abs(own - whole).sum(axis=1), 1.0)


def faults(parts: Parts, samples: Samples, num_classes: int, rule: str) -> list[Issue]:
    """What makes a partition unusable: a client without samples, a class without a client."""
    found = []
    empty = [k for k, part in enumerate(parts) if len(part) == 0]
    if empty:
        hint = "lower clients.count or choose a less skewed partition"
        found.append(Issue("partition", f"client {empty[0]} has no samples ({len(empty)} of {len(parts)} clients)", rule, hint))
    if samples.labels is not None:
        dealt = np.bincount(samples.labels[np.concatenate(parts)], minlength=num_classes)
        missing = [int(c) for c in np.flatnonzero(dealt == 0)]
        if missing:
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            hint = "give more classes to a client, or more clients (clients.count), or use more of the data (data.subset)"
            found.append(Issue("partition", f"no client has a sample of class {names}", rule, hint))
    return found


def deal(rule: Any, options: Any, samples: Samples, clients: int, num_classes: int, rng: np.random.Generator) -> Parts:
    """Deal and check. Raises RecipeError for a partition that cannot be trained on."""
    if clients > samples.count:
        raise RecipeError(
            Issue("clients.count", f"more clients than the {samples.count} training samples", clients, f"at most {samples.count}")
        )
    parts = [np.asarray(part, dtype=np.int64) for part in rule.deal(options, samples, clients, rng)]
    problems = faults(parts, samples, num_classes, str(options.name))
    if problems:
        raise RecipeError(*problems)
    return parts
