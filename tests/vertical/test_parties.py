"""Real parties over TLS on loopback: the same optimum, and nothing that does not fit gets in."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vertical.conftest import BC3, ports, recipe_of

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from tests.vertical.party_jobs import in_thread, join, network_job
from tests.vertical.party_jobs import start_party as start
from xutrain.data.party_file import load_party, load_scoring
from xutrain.errors import DataError, Diverged, Failed, Stopped, UsageError
from xutrain.launch import parties
from xutrain.loops.vertical_job import job_hash
from xutrain.loops.vertical_party import Process
from xutrain.loops.vertical_score import Scoring
from xutrain.methods.vertical.transports import identity
from xutrain.methods.vertical.transports.link import Link
from xutrain.methods.vertical.transports.wire import Envelope, Refused
from xutrain.recipe.load import from_dict

NAMES = ["mean", "error", "worst"]


def job(folder: Path, **changes: Any) -> Any:
    """A job file's recipe with three parties' CSVs of the breast cancer data and certificates in ``folder``."""
    tables, options = parties.party_tables(recipe_of())
    files = {}
    for p, table in tables.items():
        files[p] = str(folder / f"{p}.csv")
        parties._write(Path(files[p]), table, options)
    if not (folder / "ca.pem").exists():
        identity.make(folder, NAMES)
    raw: dict[str, Any] = {
        "data": {"name": "party_files", "files": files, **options},
        "method": {"name": "vfb2", "estimator": "svrg"},
        "labels": ["mean"],
        "train": {"epochs": 14, "batch_size": 32, "lr": 0.1, "weight_decay": 0.01},
        "eval": {"every_epochs": 5.0, "alone": True},
        "network": {"timeout_s": 5.0, "patience_s": 20.0},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw.get(section, {}), name: value} if name else value
    raw["network"]["addresses"] = {p: f"127.0.0.1:{port}" for p, port in zip(NAMES, ports(3), strict=True)}
    return from_dict("vertical", raw)


def run_all(recipe: Any, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    join([start(recipe, folder, p, results)[1] for p in NAMES])
    return results


def ended(results: dict[str, Any], processes: list[Process], threads: list[threading.Thread]) -> None:
    """When one party has given up, stop the others: they would wait for it to come back with what is right."""
    until = time.monotonic() + 60
    while not results and time.monotonic() < until:
        time.sleep(0.01)
    for process in processes:
        process.signalled = True
    join(threads)


def done(results: dict[str, Any]) -> bool:
    return not any(isinstance(r, BaseException) for r in results.values())


def falls_silent(gone: list[Process], after: int) -> Any:
    """For ``start``: at this party's step ``after`` the last of ``gone`` closes its port and stops, whatever the machine's speed."""

    def before(process: Process) -> None:
        wrote = process.port.wrote

        def watched(party: int) -> None:
            wrote(party)
            if process.seat.taken == after:
                gone[-1].link.close()
                gone[-1].signalled = True

        process.port.wrote = watched  # type: ignore[method-assign]

    return before


def test_three_parties_reach_the_optimum_and_predict(tmp_path):
    recipe = job(tmp_path, train__epochs=45, train__lr=0.8, train__batch_size=64)
    said: list[str] = []
    results: dict[str, Any] = {}
    started = {p: start(recipe, tmp_path, p, results, said.append) for p in NAMES}
    join(thread for _, thread in started.values())
    assert results["mean"]["objective"] == pytest.approx(BC3, abs=1e-5)
    assert results["mean"]["train_auc"] == pytest.approx(0.99670, abs=1e-3)
    assert results["mean"]["auc_alone_mean"] == pytest.approx(0.98642, abs=1e-3)  # its own columns and an intercept
    for p in NAMES:  # every party is told who can learn what
        assert any(f"{p}: pairwise masks: a requester learns the sum of the other 2" in text for text in said)
        assert any(f"{p}: each requester (mean) sees" in text and "the others hold 20 columns" in text for text in said)
    models = {p: json.loads((tmp_path / "out" / p / f"model.{p}.json").read_text()) for p in NAMES}
    lines = [json.loads(line) for line in (tmp_path / "out" / "error" / "ledger.error.jsonl").read_text().splitlines()]
    assert {line["to"] for line in lines} == {"mean"}
    assert all(line["masked"] for line in lines)
    steps = 45 * (569 // 64)
    product = next(line for line in lines if line["kind"] == "product")
    assert (product["messages"], product["bytes"]) == (steps, steps * 64 * 8)
    assert f"product to mean: {steps} messages, {steps * 64 * 8} bytes, masked" in started["error"][0].left

    again = recipe.model_copy(update={"network": job(tmp_path).network})
    results = {}
    join([in_thread(p, scoring(again, tmp_path, p, models[p]).run, results) for p in NAMES])
    assert results == {p: {"rows": 569.0} for p in NAMES}
    scores = [line.split(",") for line in (tmp_path / "scores" / "mean" / "scores.csv").read_text().splitlines()[1:]]
    assert not (tmp_path / "scores" / "error" / "scores.csv").exists()
    blocks = [load_party(recipe.data, p, Path(recipe.data.files[p])).block.train @ np.array(models[p]["weights"]) for p in NAMES]
    assert np.abs(np.array([float(s[1]) for s in scores]) - sum(blocks)).max() < 1e-8


def scoring(recipe: Any, folder: Path, party: str, model: dict[str, Any]) -> Scoring:
    mine = load_scoring(recipe.data, party, Path(recipe.data.files[party]), model)
    return Scoring(recipe, party, mine, identity.load(folder, party), folder / "scores" / party, lambda text: None, model)


def test_models_of_different_trainings_do_not_score_together(tmp_path):
    recipe = job(tmp_path)
    models = {}
    for p in NAMES:
        block = load_party(recipe.data, p, Path(recipe.data.files[p]), leader="mean").block
        known = {"columns": block.columns, "preprocessing": block.preprocessing, "weights": [0.0] * len(block.columns)}
        models[p] = {"party": p, "run": "run", "job": job_hash(recipe), "rows": "same", **known}
    results: dict[str, Any] = {}
    sides = {p: scoring(recipe, tmp_path, p, models[p] | {"rows": p}) for p in NAMES[:2]}
    ended(results, list(sides.values()), [in_thread(p, side.run, results) for p, side in sides.items()])
    assert any("models of one training" in str(r) and isinstance(r, Failed) for r in results.values()), results
    with pytest.raises(UsageError, match="another job"):
        scoring(recipe, tmp_path, "mean", models["mean"] | {"job": "of another"})
    with pytest.raises(UsageError, match="another shape"):
        scoring(recipe, tmp_path, "mean", models["mean"] | {"weights": [1.0]})


def test_certificates_that_cannot_serve_are_named(tmp_path):
    identity.make(tmp_path, ["a", "b"])
    identity.make(tmp_path / "old", ["a"], days=0)
    assert identity.days_left(identity.load(tmp_path, "a")) == pytest.approx(30, abs=0.1)

    def refused(file: str, content: bytes, message: str) -> None:
        before = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content)
        with pytest.raises(DataError, match=message):
            identity.load(tmp_path, "a")
        (tmp_path / file).write_bytes(before)

    refused("ca.pem", b"garbage", "ca.pem: cannot be read")
    refused("a.pem", b"garbage", "a.pem: cannot be read")
    refused("a.key", b"garbage", "a.key: cannot be read")
    refused("a.key", (tmp_path / "b.key").read_bytes(), "is not the key of a.pem")
    for other in ("a", "b"):  # the whole pair of another party, or out of date
        folder = tmp_path if other == "b" else tmp_path / "old"
        for end in ("pem", "key"):
            (tmp_path / f"a.{end}").write_bytes((folder / f"{other}.{end}").read_bytes())
        with pytest.raises(DataError, match="is for b" if other == "b" else "is not valid now"):
            identity.load(tmp_path, "a")


@pytest.mark.parametrize(("estimator", "mode"), [("sgd", "async"), ("saga", "sync")])
def test_other_estimators_and_lock_step(tmp_path, estimator, mode):
    recipe = job(tmp_path, method={"name": "vfb2", "estimator": estimator}, train__mode=mode, train__epochs=3)
    results = run_all(recipe, tmp_path)
    assert results["mean"]["train_auc"] > 0.98
    if mode == "sync":
        from tests.vertical.conftest import run_through
        from tests.vertical.vertical_sums import objective

        same = recipe.model_dump(exclude={"network", "data"}) | {"data": {"name": "breast_cancer"}}
        alone = run_through(from_dict("vertical", {k: v for k, v in same.items() if v is not None}))
        assert results["mean"]["objective"] == pytest.approx(objective(alone), abs=1e-7)


def test_an_absent_party_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    recipe = job(tmp_path, train__epochs=30, train__lr=0.4, network__patience_s=3.0, network__timeout_s=3.0, checkpoint={"every": 20})
    said: list[str] = []
    results: dict[str, Any] = {}
    gone: list[Process] = []
    threads = []
    for p in ("worst", "error", "mean"):
        process, thread = start(recipe, tmp_path, p, results, said.append, falls_silent(gone, 100) if p == "mean" else None)
        gone += [process] if p == "worst" else []
        threads.append(thread)
    join(threads)
    assert any("mean: worst does not answer" in text for text in said)
    assert all(isinstance(r, Stopped) and r.exit_code == 75 for r in results.values()), results
    assert "worst" in str(results["mean"])
    again = recipe.model_copy(update={"network": job(tmp_path).network})  # the same job, patient
    results = run_all(again, tmp_path)
    assert results["mean"]["objective"] == pytest.approx(BC3, abs=1e-3)


def test_a_missing_party_ends_the_wait_with_its_name(tmp_path):
    recipe = job(tmp_path, network__patience_s=1.0)
    results: dict[str, Any] = {}
    join([start(recipe, tmp_path, p, results)[1] for p in ("mean", "error")])
    assert isinstance(results["mean"], Failed)
    assert "worst" in str(results["mean"])


def test_a_party_still_greeting_when_all_is_done_is_content(tmp_path):
    """In a short run the others may have left before a party has heard that they are ready; then it has answered all that was asked."""
    recipe = job(tmp_path, train__epochs=None, train__steps=2)
    results: dict[str, Any] = {}

    def never_told(process: Process) -> None:
        meet = process.port.meet_peer

        def half(p: str, e: Envelope) -> None:
            meet(p, e)
            e.facts["known"] = 0  # as if its answers were older

        process.port.meet_peer = half  # type: ignore[method-assign]

    join([start(recipe, tmp_path, p, results, before=never_told if p == "error" else None)[1] for p in NAMES])
    assert done(results), results
    assert (tmp_path / "out" / "error" / "model.error.json").is_file()


def test_another_recipe_is_refused_and_named(tmp_path):
    recipe = job(tmp_path)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 0.2})})
    assert job_hash(recipe) != job_hash(other)
    results: dict[str, Any] = {}
    started = {p: start(r, tmp_path, p, results) for p, r in (("mean", recipe), ("error", recipe), ("worst", other))}
    ended(results, [process for process, _ in started.values()], [thread for _, thread in started.values()])
    assert any("another recipe" in str(r) and isinstance(r, Failed) for r in results.values()), results


@pytest.fixture
def pair(tmp_path):
    """A waiting party "error" with sessions of all peers, and a bare link of "mean"."""
    recipe = job(tmp_path)
    mine = load_party(recipe.data, "error", Path(recipe.data.files["error"]))
    process = Process(recipe, "error", mine, identity.load(tmp_path, "error"), tmp_path / "out" / "error", lambda text: None)
    process.link.start()
    addresses = recipe.network.addresses
    sender = Link(identity.load(tmp_path, "mean"), addresses, "run", process.link.recipe, lambda e: e, refused=lambda a, b: None)
    yield process, sender, tmp_path, addresses
    process.link.close(0)
    sender.close(0)


def greet(process: Process, sender: Link) -> list[bytes]:
    """Sessions of mean and worst at the party; returns what a request must name."""
    facts = {"rows": process.port.facts["rows"], "order": process.port.facts["order"]}
    sender.ask("error", Envelope("hello", sessions=[b"m" * 8, process.port.public], facts=facts))
    hello = Envelope("hello", sender="worst", sessions=[b"w" * 8, process.port.public], facts=facts)
    process.port.handle(hello)
    return [process.port.session, b"w" * 8]


def untouched(process: Process) -> bool:
    return not process.seat.method.weights.any() and process.port.applied == 0


def test_requests_that_do_not_fit_are_refused_and_change_nothing(pair):
    process, sender, folder, _ = pair
    rows, values = np.arange(4, dtype=np.uint32), np.ones(4)
    with pytest.raises(ConnectionError, match="not greeted"):
        sender.ask("error", Envelope("tell", rows=rows, values=values))
    with pytest.raises(ConnectionError, match="order of the ids"):
        sender.ask("error", Envelope("hello", sessions=[b"m" * 8, process.port.public], facts={"rows": 569, "order": "x"}))
    sessions = greet(process, sender)
    both = ["error", "worst"]
    bad = [
        Envelope("tell", rows=np.array([569], dtype=np.uint32), values=np.ones(1)),
        Envelope("tell", rows=rows, values=np.ones(5)),
        Envelope("tell", rows=rows, values=np.ones(4, dtype=np.uint64)),
        Envelope("tell", rows=rows),
        Envelope("refer", values=np.ones(3)),
        Envelope("ask", rows=rows, request=1, parties=["error"], sessions=sessions[:1]),
        Envelope("ask", rows=rows, request=2, parties=both, sessions=[sessions[0], b"x" * 8]),
        Envelope("ask", rows=rows, request=3, parties=[*both, "mean"], sessions=[*sessions, b"m" * 8]),
        Envelope("ask", rows=np.zeros(0, dtype=np.uint32), request=4, parties=both, sessions=sessions),
        Envelope("evaluate", request=5, parties=both, sessions=sessions, facts={"split": "all"}),
        Envelope("ask", rows=rows, request=7, parties=["error", "ghost"], sessions=[sessions[0], b""]),
        Envelope("ask", rows=rows, request=8, number=14 * (569 // 32), parties=both, sessions=sessions),
        Envelope("tell", rows=rows, values=values, number=1 << 40),
        Envelope("hello", sessions=[b"n" * 8, bytes(32)], facts=process.port.facts),
        Envelope("blind", values=np.ones(4, dtype=np.uint64)),
    ]
    for e in bad:
        with pytest.raises(ConnectionError, match="refused"):
            sender.ask("error", e)
    assert untouched(process)
    good = Envelope("ask", rows=rows, request=6, parties=both, sessions=sessions)
    assert sender.ask("error", good).values.dtype == np.uint64
    with pytest.raises(ConnectionError, match="replayed"):  # a request number masks once
        sender.ask("error", Envelope("ask", rows=rows, request=6, parties=both, sessions=sessions))
    assert len((folder / "out" / "error" / "refused.jsonl").read_text().splitlines()) == len(bad) + 3


def test_a_party_without_labels_may_not_ask(pair):
    process, sender, _, _ = pair
    sessions = greet(process, sender)
    with pytest.raises(Refused, match="may not ask"):
        process.port.handle(Envelope("ask", sender="worst", rows=np.arange(2, dtype=np.uint32), parties=["error"], sessions=sessions[:1]))


def test_a_signal_that_is_sent_again_is_applied_once(pair):
    """A late acknowledgement makes a label holder send again; one that has started anew may use its numbers again."""
    process, sender, _, _ = pair
    greet(process, sender)
    process.port.peers["mean"].session = b"m" * 8
    again = Envelope("tell", number=3, rows=np.arange(2, dtype=np.uint32), values=np.ones(2))
    sender.ask("error", again)
    once = process.seat.method.weights.copy()
    sender.ask("error", again)
    assert np.array_equal(process.seat.method.weights, once) and process.port.applied == 1
    process.port.peers["mean"].session = b"n" * 8
    sender.ask("error", again)
    assert process.port.applied == 2


def test_a_product_that_masks_cannot_hold_ends_the_run_at_all_parties(tmp_path, pair):
    process, sender, _, _ = pair
    sessions = greet(process, sender)
    process.seat.method.weights[:] = 1e12
    with pytest.raises(ConnectionError, match="outside the range of the masks"):
        rows = np.arange(4, dtype=np.uint32)
        sender.ask("error", Envelope("ask", rows=rows, request=1, parties=["error", "worst"], sessions=sessions))
    assert isinstance(process.port.fault, Diverged)
    (tmp_path / "wild").mkdir()
    wild = job(tmp_path / "wild", method={"name": "vfb2"}, train__lr=1e6, train__epochs=4)
    results = run_all(wild, tmp_path / "wild")
    assert any(isinstance(r, Diverged) for r in results.values()), results
    assert all(isinstance(r, (Diverged, Stopped)) for r in results.values()), results


def test_replayed_oversized_and_garbled_bytes_are_refused(pair):
    import grpc

    process, sender, folder, addresses = pair
    greet(process, sender)
    data = sender._sealed(Envelope("tell", rows=np.arange(2, dtype=np.uint32), values=np.zeros(2)))
    send = sender._send["error"]
    send(data, timeout=5)
    for wrong in (data, data[:-7], b"", b"\xff" * 50, data.replace(b"mean", b"erro")):
        with pytest.raises(grpc.RpcError):
            send(wrong, timeout=5)
    assert not process.seat.method.weights.any()
    assert process.port.applied == 1
    big = Link(
        identity.load(folder, "mean"),
        addresses,
        "run",
        process.link.recipe,
        lambda e: e,
        refused=lambda a, b: None,
        max_bytes=1 << 30,
        listen="127.0.0.1:0",
    )
    with pytest.raises(ConnectionError):
        big.ask("error", Envelope("refer", values=np.zeros(9 << 20)), timeout_s=20)
    big.close(0)
    assert process.port.applied == 1


def test_fuzzed_messages_raise_nothing_but_refusals(pair):
    process, sender, _, _ = pair
    greet(process, sender)
    rng = np.random.default_rng(0)
    from xutrain.methods.vertical.transports.wire import KINDS, pack, unpack

    base = [
        pack(
            Envelope(
                kind,
                sender="mean",
                counter=9,
                rows=np.arange(3, dtype=np.uint32),
                values=np.ones(3),
                parties=["error"],
                sessions=[b"1" * 8],
            )
        )
        for kind in KINDS
    ]
    before = process.seat.method.state()["weights"].copy()
    passed = 0
    for k in range(3000):
        data = bytearray(base[k % len(base)])
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            e = unpack(bytes(data))
            passed += 1
            if e.kind in ("stop", "done", "tell", "refer", "hello"):
                continue  # whole and well formed: legitimate from this sender
            e.sender = "mean"
            process.port.handle(e)
        except Refused:
            continue
    assert passed > 0
    assert np.array_equal(before, process.seat.method.state()["weights"])


def test_a_certificate_of_another_authority_or_of_another_party_is_refused(pair):
    process, sender, folder, addresses = pair
    stranger = folder / "stranger"
    identity.make(stranger, NAMES)
    link = Link(
        identity.load(stranger, "mean"), addresses, "run", process.link.recipe, lambda e: e, refused=lambda a, b: None, listen="127.0.0.1:0"
    )
    with pytest.raises(ConnectionError, match="unreachable"):
        link.ask("error", Envelope("ping"), timeout_s=3)
    link.close(0)
    sender.party = "worst"  # mean's certificate, worst's name
    with pytest.raises(ConnectionError, match="certificate"):
        sender.ask("error", Envelope("ping"))
    assert untouched(process)


def test_a_checkpoint_just_before_a_full_pass_goes_on(tmp_path):
    first = job(tmp_path, train__steps=17, train__epochs=None, train__lr=0.4)
    run_all(first, tmp_path)
    longer = job(tmp_path, train__steps=60, train__epochs=None, train__lr=0.4)
    for p in NAMES:  # the same states, of a longer run
        path = tmp_path / "out" / p / "state.npz"
        with np.load(path) as saved:
            arrays = {k: saved[k] for k in saved.files}
        np.savez(path, **{**arrays, "job": np.array(job_hash(longer))})
    assert run_all(longer, tmp_path)["mean"]["train_auc"] > 0.99


def test_four_parties_go_on_without_a_lost_one(tmp_path):
    raw = {
        "data": {"name": "breast_cancer", "parties": 4},
        "method": {"name": "vfb2"},
        "labels": ["party0"],
        "train": {"steps": 400, "batch_size": 32, "lr": 0.02, "weight_decay": 0.01},
        "network": {"lost": "go_on", "timeout_s": 3.0, "patience_s": 60.0},
    }
    recipe = network_job(tmp_path, raw)
    results: dict[str, Any] = {}
    said: list[str] = []
    gone: list[Process] = []
    threads = []
    for p in ("party3", "party2", "party1", "party0"):
        process, thread = start(recipe, tmp_path, p, results, said.append, falls_silent(gone, 50) if p == "party0" else None)
        gone += [process] if p == "party3" else []
        threads.append(thread)
    join(threads)
    assert any("party0: party3 does not answer" in text and "without its share" in text for text in said)
    assert isinstance(results.pop("party3"), Stopped)
    assert done(results), (results, said)
    assert results["party0"]["train_auc"] > 0.9
