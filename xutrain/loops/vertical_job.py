"""What real parties must have in common before anything starts, and what they cannot do."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from xutrain.errors import Issue


def job_hash(recipe: Any) -> str:
    """Hash of what all parties must have in common: everything but local paths, addresses and patience."""
    value = recipe.model_dump(mode="json", exclude={"log", "checkpoint", "summary", "paper", "smoke", "network", "scale", "eval"})
    if "files" in value["data"]:
        value["data"]["files"] = list(value["data"]["files"])
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def network_issues(recipe: Any) -> list[Issue]:
    """What a simulation may do and real parties may not."""
    found = []
    method, train = recipe.method_class, recipe.train
    several = isinstance(recipe.labels, list) and len(recipe.labels) > 1
    if method.exchange != "request" or method.pooled:
        found.append(Issue("method.name", "is a baseline for simulations", recipe.method.name, "method=vfb2"))
    if recipe.security.mode == "tree":
        found.append(
            Issue(
                "security.mode",
                "tree sums are for simulations; pairwise masks hide more with fewer messages",
                "tree",
                "security.mode=pairwise",
            )
        )
    if several and (train.mode == "sync" or method.passes(recipe.method) == "barrier"):
        found.append(
            Issue(
                "train.mode",
                "over the network several label holders do not wait for each other",
                train.mode,
                "train.mode=async, method.snapshot=rolling",
            )
        )
    if recipe.loss == "softmax":
        found.append(Issue("loss", "real parties train logistic and ridge models", "softmax", "loss=logistic"))
    if not isinstance(recipe.labels, list):
        found.append(Issue("labels", "real parties must be told who holds the labels", recipe.labels, "labels: [bank]"))
    if not hasattr(recipe.data, "id"):
        found.append(
            Issue(
                "data.name",
                "real parties read files of their own",
                recipe.data.name,
                "data: {name: party_files, files: {...}, id: ..., label: ...}",
            )
        )
    if train.budget == "total" or train.rates == "compensated":
        found.append(
            Issue(
                "train.budget",
                "shared budgets and compensated rates are for simulations",
                train.budget,
                "train.budget=local train.rates=equal",
            )
        )
    missing = [p for p in recipe.party_names if p not in recipe.network.addresses]
    if missing:
        found.append(
            Issue(
                "network.addresses",
                f"no address for {', '.join(missing)}",
                hint="network: {addresses: {bank: host:port, ...}}",
                has_value=False,
            )
        )
    return found
