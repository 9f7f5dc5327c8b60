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


def leader_of(recipe: Any) -> str | None:
    """The first label holder, in the order of the parties."""
    return next((p for p in recipe.party_names if isinstance(recipe.labels, list) and p in recipe.labels), None)


def network_issues(recipe: Any) -> list[Issue]:
    """What a simulation may do and real parties may not."""
    found = []
    method = recipe.method_class
    if method.exchange != "request" or method.pooled:
        found.append(Issue("method.name", "is a baseline for simulations", recipe.method.name, "method=vfb2"))
    if recipe.security.mode == "tree" and recipe.network.lost == "go_on":
        found.append(
            Issue(
                "network.lost", "trees are fixed: nobody can be left out of a sum", "go_on", "network.lost=wait, or security.mode=pairwise"
            )
        )
    if recipe.loss == "softmax" and not getattr(recipe.data, "classes", None):
        found.append(
            Issue(
                "data.classes",
                "only label holders see the labels, so the job must say how many classes",
                has_value=False,
                hint="data.classes=10",
            )
        )
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
    for p, address in recipe.network.addresses.items():
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            found.append(Issue(f"network.addresses.{p}", "is no host:port", address, "for example bank.example.org:7001"))
    if twice := [p for p in recipe.party_names if list(recipe.network.addresses.values()).count(recipe.network.addresses.get(p)) > 1]:
        found.append(Issue("network.addresses", f"{' and '.join(twice)} have the same", recipe.network.addresses[twice[0]]))
    return found
