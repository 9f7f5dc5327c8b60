"""Real parties in threads of one process: what tests of the network start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.vertical.conftest import ports
from xutrain.data.party_file import load_party
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
    network = {"timeout_s": 10.0, "patience_s": 30.0, **raw.get("network", {})}
    network["addresses"] = {p: f"127.0.0.1:{port}" for p, port in zip(names, ports(len(names)), strict=True)}
    return from_dict("vertical", {**raw, "data": {"name": "party_files", "files": files, **options}, "labels": holders, "network": network})


def start_party(
    recipe: Any, folder: Path, party: str, results: dict[str, Any], say: Any = None, before: Callable[[Process], None] | None = None
) -> tuple[Process, threading.Thread]:
    """A party's process and its running thread. ``before`` may change the process before it starts."""
    mine = load_party(recipe.data, party, Path(recipe.data.files[party]), leader=leader_of(recipe))
    process = Process(recipe, party, mine, identity.load(folder, party), folder / "out" / party, say or (lambda text: None))
    if before is not None:
        before(process)
    return process, in_thread(party, process.run, results)


def in_thread(party: str, run: Callable[[], Any], results: dict[str, Any]) -> threading.Thread:
    """Run a party's part in a thread; what it returns or raises becomes its result, so that no fault goes unseen."""

    def go() -> None:
        try:
            results[party] = run()
        except BaseException as error:
            results[party] = error

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread


def join(threads: Iterable[threading.Thread], seconds: float = 200) -> None:
    """Wait for all of them; the limit is there for a hang, not for a slow machine."""
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
        assert not thread.is_alive()


def run_parties(recipe: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Process]]:
    """Results (metrics or the error) and processes of all parties."""
    results: dict[str, Any] = {}
    started = {p: start_party(recipe, folder, p, results) for p in recipe.party_names}
    join(thread for _, thread in started.values())
    return results, {p: process for p, (process, _) in started.items()}
