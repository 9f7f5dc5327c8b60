"""All parties on one machine as processes of their own, over TLS on loopback; checks and attacks of the vertical verb. No torch here."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import platform
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xutrain import registry
from xutrain.data.party_table import is_libsvm, read_table
from xutrain.data.tabular import Table, VerticalData
from xutrain.errors import DataError, Issue, UsageError, XutrainError

Say = Callable[[str], None]
ID, LABEL = "row_id", "label"


def simulate(recipe: Any, out: Path, say: Say, *, deadline_s: float = 3600.0) -> dict[str, Any]:
    """Start every party of a recipe here, each with its own file, certificate, port and folder under ``out``; wait for all.

    A data set that is no set of party files is written out as files first. Ids that are not the same everywhere are joined here; real
    parties align by ``xutrain vertical align``.
    """
    from xutrain.loops.vertical_job import network_issues
    from xutrain.methods.vertical.transports.identity import make
    from xutrain.recipe import yamlfile
    from xutrain.recipe.load import from_dict

    started = time.monotonic()
    if found := [i for i in network_issues(recipe) if i.where == "method.name"]:
        raise UsageError(*found)
    tables, options = party_tables(recipe)
    names = list(tables)
    owner = next((p for p, t in tables.items() if t.label is not None), None)
    if owner is None:
        raise DataError(Issue("data.label", "no party's file has labels", options.get("label")))
    holders = names if recipe.labels == "all" else [p for p in names if p in recipe.labels] if recipe.labels else [owner]
    holder = holders[0]
    out.mkdir(parents=True, exist_ok=True)
    common = set.intersection(*(set(t.ids) for t in tables.values()))
    if not common:
        raise DataError(Issue("data", "the parties have no id in common", {p: len(t.ids) for p, t in tables.items()}))
    share_labels(tables, owner, holders)
    files = {}
    for p, table in tables.items():
        (out / p).mkdir(exist_ok=True)
        files[p] = str((out / p / ("data.csv" if table.matrix is None else "data.svm")).resolve())
        _write(Path(files[p]), table, options)
        (out / p / "rows.json").write_text(json.dumps({"ids": sorted(common)}), encoding="utf-8")
    make(out / "identity", names)
    for p in names:
        mine = out / p / "identity"
        mine.mkdir(exist_ok=True)
        for file in ("ca.pem", f"{p}.pem", f"{p}.key"):
            shutil.copy(out / "identity" / file, mine / file)
    raw = recipe.model_dump(mode="json")
    raw["data"] = {"name": "party_files", "files": files, **options}
    raw["labels"] = holders
    raw["eval"]["reference"] = False
    raw = {k: v for k, v in raw.items() if v is not None}
    with reserved_ports(len(names)) as ports:
        addresses = {p: f"127.0.0.1:{port}" for p, port in zip(names, ports, strict=True)}
        raw["network"] = {**raw["network"], "addresses": addresses}
        if found := network_issues(from_dict("vertical", raw)):
            raise UsageError(*found)
        (out / "job.yaml").write_text(yamlfile.dump(raw), encoding="utf-8")
        say(f"starting {len(names)} parties: {', '.join(names)}; labels at {', '.join(holders)}; job file {out / 'job.yaml'}")
        codes = _wait({p: _start(out, p) for p in names}, deadline_s)
    seconds = time.monotonic() - started
    model = out / holder / f"model.{holder}.json"
    metrics = json.loads(model.read_text(encoding="utf-8")).get("metrics", {}) if model.is_file() else {}
    codes = {p: code if code >= 0 else 1 for p, code in codes.items()}  # ended by a signal
    worst = max(codes.values(), key=lambda c: (c != 0, c == 1, c))
    return {
        "status": "done" if worst == 0 else "stopped" if worst == 75 else "failed",
        "exit_code": worst,
        "metrics": {**metrics, "wall_s": round(seconds, 2)},
        "out": str(out),
        "models": ", ".join(f"{p}/model.{p}.json" for p in names),
        "left each party, bytes": ", ".join(f"{p} {left_bytes(out / p / f'ledger.{p}.jsonl')}" for p in names),
    }


def left_bytes(ledger: Path) -> int:
    """Bytes of payload that left a party, by its ledger."""
    return sum(json.loads(line)["bytes"] for line in ledger.read_text(encoding="utf-8").splitlines()) if ledger.is_file() else 0


def party_tables(recipe: Any) -> tuple[dict[str, Table], dict[str, Any]]:
    """One table per party with ids and raw columns, and the ``party_files`` options that go with them."""
    data = recipe.data
    if data.name == "party_files":
        tables = {p: read_table(Path(f), data) for p, f in data.files.items()}
        return tables, data.model_dump(exclude={"name", "files"})
    shared = {"id": ID, "label": LABEL, "test_fraction": data.test_fraction}
    if data.name == "german_credit":
        from xutrain.data.german_credit import tables as german

        return german(), {**shared, "intercept": data.intercept}
    built: VerticalData = registry.load("dataset", data.name).build(data.model_copy(update={"test_fraction": 0.0}), recipe.seed)
    ids = [f"r{i:07d}" for i in range(built.n)]
    found = {}
    for party in built.parties:
        x = party.train.toarray() if hasattr(party.train, "toarray") else party.train
        columns = {c: [repr(float(v)) for v in x[:, j]] for j, c in enumerate(party.columns)}
        label = [repr(v) for v in built.y.tolist()] if party.name == built.label_holder else None
        found[party.name] = Table(Path(party.name), ids, columns, label)
    return found, {**shared, "intercept": False, "task": built.task, "classes": built.classes or None}


def share_labels(tables: dict[str, Table], owner: str, holders: list[str]) -> None:
    """Give every label holder the labels of the party whose file has them: what several real holders have in files of their own."""
    source = tables[owner]
    known = dict(zip(source.ids, source.label or [], strict=True))
    for p, table in tables.items():
        if p not in holders:
            table.label = None
        elif table.label is None:
            kept = [at for at, i in enumerate(table.ids) if i in known]
            table.ids = [table.ids[at] for at in kept]
            table.columns = {c: [cells[at] for at in kept] for c, cells in table.columns.items()}
            table.matrix = None if table.matrix is None else table.matrix[kept]
            table.label = [known[i] for i in table.ids]


def _write(path: Path, table: Table, options: dict[str, Any]) -> None:
    if table.matrix is not None:
        x, base = table.matrix, not table.form["zero_based"]
        lines = [
            " ".join([y, *(f"{j + base}:{v!r}" for j, v in zip(row.indices.tolist(), row.data.tolist(), strict=True))])
            for y, row in zip(table.label or ["0"] * x.shape[0], (x[i] for i in range(x.shape[0])), strict=True)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        path.with_name(path.name + ".ids").write_text("\n".join(table.ids) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([options["id"], *table.columns, *([options["label"]] if table.label is not None else [])])
        writer.writerows(zip(table.ids, *table.columns.values(), *([table.label] if table.label is not None else []), strict=True))


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Free ports on loopback, kept from other programs until the end: a socket stays bound to each, but does not listen.

    Linux lets a server that sets SO_REUSEADDR, as gRPC does, listen beside such a socket. Elsewhere the ports are only chosen.
    """
    held = [socket.socket() for _ in range(count)]
    try:
        for s in held:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in held]
        if sys.platform != "linux":
            for s in held:
                s.close()
        yield ports
    finally:
        for s in held:
            s.close()


class _Forked:
    """A party's process that inherits what this one has imported; the same waiting and ending as of a Popen."""

    def __init__(self, arguments: list[str]) -> None:
        from xutrain.loops import vertical_party  # imported once, here, and not by every party

        assert vertical_party
        self._process = multiprocessing.get_context("fork").Process(target=_party, args=(arguments,))
        self._process.start()

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("party", timeout)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


def _party(arguments: list[str]) -> None:
    """In the child: the command, with nothing on stdout, as a party of its own would run it."""
    sys.argv = ["xutrain", *arguments]
    code: Any = 0
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            runpy.run_module("xutrain", run_name="__main__")
        except SystemExit as end:
            code = end.code
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _start(out: Path, party: str) -> _Forked | subprocess.Popen[bytes]:
    """Start ``xutrain vertical train --party``: by fork where this process has one thread only, which spares every party its imports."""
    words = ["vertical", "train", "--party", party, "--config", str(out / "job.yaml")]
    words += ["--identity", str(out / party / "identity"), "--rows", str(out / party / "rows.json"), "--out", str(out / party)]
    if hasattr(os, "fork") and threading.active_count() == 1 and "torch" not in sys.modules:
        return _Forked(words)
    return subprocess.Popen([sys.executable, "-m", "xutrain", *words], stdout=subprocess.DEVNULL)


def _wait(running: Mapping[str, _Forked | subprocess.Popen[bytes]], deadline_s: float) -> dict[str, int]:
    until = time.monotonic() + deadline_s
    try:
        return {p: child.wait(max(0.1, until - time.monotonic())) for p, child in running.items()}
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for child in running.values():
            child.terminate()
        return {p: child.wait(30) for p, child in running.items()}


def examine(recipe: Any, party: str, path: Path, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """What ``doctor`` finds: packages, recipe, certificate, file, port, and each other party's reach, job and clock."""
    from xutrain.loops.vertical_job import job_hash, network_issues
    from xutrain.methods.vertical.transports import identity as identities
    from xutrain.methods.vertical.transports.link import Link
    from xutrain.methods.vertical.transports.wire import Envelope

    found: list[dict[str, Any]] = []

    def check(name: str, look: Callable[[], str]) -> bool:
        try:
            found.append({"check": name, "ok": True, "found": look()})
        except XutrainError as error:
            found.append({"check": name, "ok": False, "found": "; ".join(f"{i.where}: {i.what}" for i in error.issues)})
        except ValueError as error:
            found.append({"check": name, "ok": False, "found": str(error)})
        return bool(found[-1]["ok"])

    def job() -> str:
        if issues := network_issues(recipe):
            raise UsageError(*issues)
        return f"{recipe.method.name}, {recipe.security.mode}, job {job_hash(recipe)[:12]}"

    fits = check("job", job)
    check("file", lambda: _describe_file(recipe, path))
    if not check("certificate", lambda: f"for {party}, {identities.days_left(identities.load(folder, party)):.0f} days left") or not fits:
        return found
    facts = {"versions": f"python {platform.python_version()}"}
    seen: set[str] = set()

    def answer(e: Envelope) -> Envelope:
        seen.add(e.sender)
        return Envelope("ping", facts={**facts, "time": time.time()})

    network = recipe.network
    names = recipe.party_names
    try:
        link = Link(
            identities.load(folder, party),
            {n: network.addresses[n] for n in names},
            network.run,
            f"train {job_hash(recipe)}",
            answer,
            refused=lambda sender, reason: found.append({"check": f"call from {sender}", "ok": False, "found": f"refused: {reason}"}),
        )
    except XutrainError as error:
        return [*found, {"check": "port", "ok": False, "found": error.issues[0].what}]
    link.start()
    found.append({"check": "port", "ok": True, "found": f"listening on {network.addresses[party]}"})
    others = [n for n in names if n != party]
    until = time.monotonic() + seconds
    for p in others:
        reason, reply, sent = "no answer", None, 0.0
        while reply is None and time.monotonic() < until:
            try:
                sent = time.time()
                reply = link.ask(p, Envelope("ping"), timeout_s=2.0)
            except ConnectionError as error:
                reason = str(error)
                time.sleep(0.2)
        if reply is None:
            found.append({"check": f"reach {p}", "ok": False, "found": f"{network.addresses[p]}: {reason}"})
            continue
        apart = float(reply.facts.get("time", sent)) - sent
        text = (
            f"{network.addresses[p]}, mutual TLS, same job, clocks {abs(apart):.2f} s apart, {reply.facts.get('versions', 'in training')}"
        )
        found.append({"check": f"reach {p}", "ok": abs(apart) < 60, "found": text})
    while set(others) - seen and time.monotonic() < until:
        time.sleep(0.1)
    for p in others:
        found.append({"check": f"reached by {p}", "ok": p in seen, "found": "yes" if p in seen else f"no call within {seconds:g} s"})
    link.close()
    return found


def _describe_file(recipe: Any, path: Path) -> str:
    table = read_table(path, recipe.data)
    width = len(table.columns) if table.matrix is None else table.matrix.shape[1]
    said = f" ({table.note})" if is_libsvm(path) else ""
    return f"{path}: {len(table.ids)} rows, {width} columns" + (", labels" if table.label is not None else "") + said


def audit(recipe: Any, attack: str, known: int) -> dict[str, Any]:
    """Carry out an attack on the recipe's own data; a value that the command prints."""
    from xutrain.methods.vertical import attacks
    from xutrain.methods.vertical.plan import load_data
    from xutrain.methods.vertical.security import trees

    names = recipe.party_names
    if attack == "trees":
        kinds = ["auto", "chain", "binomial", "same_star"]
        rows = []
        for kind in kinds:
            try:
                pair = trees.pair(kind, len(names))
                breaking = "none up to 3" if pair.breaking is None else str([names[p] for p in pair.breaking])
                rows.append([kind, "accepted", breaking, str(pair.t1), str(pair.t2)])
            except XutrainError as error:
                rows.append([kind, "REFUSED", error.issues[0].what, "", ""])
        says = [f"{len(names)} parties; a pair of trees from which one party alone learns a product is refused"]
        return {"attack": attack, "says": says, "columns": ["trees", "verdict", "smallest coalition that learns", "T1", "T2"], "rows": rows}
    data = load_data(recipe)
    named = isinstance(recipe.labels, list) and len(names) > 1
    holder = names.index(recipe.labels[0] if named else data.label_holder)
    if attack == "labels":
        if recipe.loss != "logistic":
            raise UsageError(Issue("loss", "the sign attack is on logistic signals", recipe.loss))
        from xutrain.methods.vertical.losses import Logistic

        z = np.random.default_rng(recipe.seed).standard_normal(data.n)
        right = float((attacks.labels_from_signals(Logistic().theta(z, data.y)) == data.y).mean())
        says = [
            "backward updating sends theta = -y sigmoid(-y z), whose sign is the label:",
            f"a collaborator reads {right:.1%} of the labels of the samples that it is sent",
        ]
        return {"attack": attack, "says": says, "columns": [], "rows": [], "labels_read": right}
    if attack != "totals":
        raise UsageError(Issue("--attack", "must be totals, labels or trees", attack))
    others = [p for p in range(len(names)) if p != holder]
    if not others or recipe.method.name == "fdml":
        what = "shares predictions, no products" if others else "has one party: there is nobody to learn from"
        raise UsageError(Issue("method.name", what, recipe.method.name, "method=vfb2"))
    blocks: list[Any] = [data.parties[p].train for p in others]
    truth = np.hstack([np.asarray(x.toarray() if hasattr(x, "toarray") else x) for x in blocks])
    width = int(np.linalg.matrix_rank(truth))
    count = known or truth.shape[1] + 5
    if count >= data.n:
        raise UsageError(Issue("--known", f"the data has {data.n} rows", count))
    rows_known = np.random.default_rng(recipe.seed).choice(data.n, size=count, replace=False)
    enough = -(-width // max(1, data.classes - 1))  # passes
    seen = attacks.observed_totals(recipe, data, holder, enough + 5)
    chosen = sorted({1, 2, 4, enough // 2, enough - 1, enough, enough + 5} & set(range(1, seen.shape[1] + 1)))
    table: list[list[Any]] = [[t, attacks.totals_attack(seen[:, :t].reshape(data.n, -1), truth, rows_known)] for t in chosen]
    says = [
        f"{names[holder]} sees totals only (masks do not help), knows {count} customers, and solves for {truth.shape[1]} columns of "
        f"{', '.join(names[p] for p in others)} (rank {width}):",
        "relative error of the others' features for all other customers, by full passes seen (1 = nothing learnt):",
    ]
    return {"attack": attack, "says": says, "columns": ["passes", "relative error"], "rows": table}
