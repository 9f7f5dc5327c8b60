"""Real parties in threads of one process: what tests of the network start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from xutrain.data.party_file import load_party
from xutrain.errors import XutrainError
from xutrain.launch import parties
from xutrain.loops.vertical_job import leader_of
from xutrain.loops.vertical_party import Process
from xutrain.methods.vertical.transports import identity
from xutrain.recipe.load import from_dict


def network_job(folder: Path, raw: dict[str, Any]) -> Any:
    """A job of real parties from a simulation's recipe: files, certificates, addresses."""
    recipe = from_dict("vertical", raw)
    tables, options = parties.party_tables(recipe)
    names = list(tables)
    owner = next(p for p, t in tables.items() if t.label is not None)
    holders = names if recipe.labels == "all" else list(recipe.labels or [owner])
    parties.share_labels(tables, owner, holders)
    files = {}
    for p, table in tables.items():
        files[p] = str(folder / f"{p}{'.csv' if table.matrix is None else '.svm'}")
        parties._write(Path(files[p]), table, options)
    if not (folder / "ca.pem").exists():
        identity.make(folder, names)
    ports = parties._free_ports(len(names))
    network = {"timeout_s": 10.0, "patience_s": 30.0, **raw.get("network", {})}
    network["addresses"] = {p: f"127.0.0.1:{port}" for p, port in zip(names, ports, strict=True)}
    return from_dict("vertical", {**raw, "data": {"name": "party_files", "files": files, **options}, "labels": holders, "network": network})


def start_party(recipe: Any, folder: Path, party: str, results: dict[str, Any], say: Any = None) -> tuple[Process, threading.Thread]:
    mine = load_party(recipe.data, party, Path(recipe.data.files[party]), leader=leader_of(recipe))
    process = Process(recipe, party, mine, identity.load(folder, party), folder / "out" / party, say or (lambda text: None))

    def go() -> None:
        try:
            results[party] = process.run()
        except XutrainError as error:
            results[party] = error

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return process, thread


def run_parties(recipe: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Process]]:
    """Results (metrics or the error) and processes of all parties."""
    results: dict[str, Any] = {}
    started = {p: start_party(recipe, folder, p, results) for p in recipe.party_names}
    for _, thread in started.values():
        thread.join(90)
        assert not thread.is_alive()
    return results, {p: process for p, (process, _) in started.items()}
