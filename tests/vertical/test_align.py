"""Private set intersection over TLS, and what ``doctor`` finds."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from tests.vertical.party_jobs import in_thread, join
from tests.vertical.test_parties import NAMES, job
from xutrain.errors import DataError, Failed
from xutrain.launch import parties
from xutrain.loops.vertical_align import Alignment
from xutrain.methods.vertical.transports import identity
from xutrain.methods.vertical.transports.wire import Envelope, Refused


def test_alignment_finds_the_common_ids_in_one_order(tmp_path):
    recipe = job(tmp_path)
    lists = {"mean": ["a", "b", "c", "d"], "error": ["d", "x", "b", "a"], "worst": ["b", "q", "a", "d", "z"]}
    found: dict[str, Any] = {}

    sides = {p: Alignment(recipe, p, lists[p], identity.load(tmp_path, p), lambda text: None) for p in NAMES}
    join([in_thread(p, side.run, found) for p, side in sides.items()])
    assert sorted(found["mean"][0]) == ["a", "b", "d"]
    assert found["mean"][0] == found["error"][0] == found["worst"][0]
    assert found["worst"][1]["dropped"] == 2


def test_long_lists_go_round_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("xutrain.loops.vertical_align.CHUNK", 7)
    recipe = job(tmp_path)
    lists = {"mean": [f"c{i}" for i in range(40)], "error": ["c3", "c39", "x"], "worst": [f"c{i}" for i in range(39, 2, -1)]}
    found: dict[str, Any] = {}
    sides = {p: Alignment(recipe, p, lists[p], identity.load(tmp_path, p), lambda text: None) for p in NAMES}
    join([in_thread(p, side.run, found) for p, side in sides.items()])
    assert sorted(found["error"][0]) == ["c3", "c39"]
    assert found["mean"][0] == found["error"][0] == found["worst"][0]
    assert found["error"][1]["rows of mean"] == 40


def test_a_party_with_a_long_list_is_waited_for_as_long_as_it_is_there(tmp_path, monkeypatch):
    recipe = job(tmp_path)
    sides = {p: Alignment(recipe, p, ["a"], identity.load(tmp_path, p), lambda text: None) for p in NAMES}
    clock = itertools.count(0.0, 3.0)  # seconds that pass between two looks at the clock; patience is 20
    monkeypatch.setattr("xutrain.loops.vertical_align.time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda s: None))
    have: set[str] = {"worst"}
    pings = 0
    handle = sides["mean"].handle

    def count(e: Envelope) -> Envelope:
        nonlocal pings
        pings += 1
        if pings == 30:
            have.add("mean")
        return handle(e)

    for side in sides.values():
        side.link.start()
    sides["mean"].link.handler = count
    sides["error"]._until(have, "finished list")
    assert next(clock) > 100
    sides["mean"].link.close(0)
    with pytest.raises(Failed, match="no thanks from mean"):
        sides["error"]._until({"worst"}, "thanks")
    for side in sides.values():
        side.link.close(0)


def test_an_empty_list_and_false_points(tmp_path):
    recipe = job(tmp_path)
    sides = {p: Alignment(recipe, p, [] if p == "error" else ["a"], identity.load(tmp_path, p), lambda text: None) for p in NAMES}
    with pytest.raises(Refused, match="no point"):
        sides["mean"].handle(Envelope("blind", sender="error", number=1, values=np.zeros(4, dtype=np.uint64)))
    found: dict[str, Any] = {}
    join([in_thread(p, side.run, found) for p, side in sides.items()])
    assert all(isinstance(r, DataError) for r in found.values()), found


def test_doctor_names_what_is_missing(tmp_path):
    recipe = job(tmp_path)
    found = parties.examine(recipe, "mean", Path(recipe.data.files["mean"]), tmp_path, 0.5)
    by_name = {f["check"]: f["ok"] for f in found}
    assert by_name["job"] and by_name["file"] and by_name["certificate"] and by_name["port"]
    assert not by_name["reach error"]
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does, or the reservation keeps it away
    host, port = recipe.network.addresses["mean"].split(":")
    taken.bind((host, int(port)))
    taken.listen()
    assert not parties.examine(recipe, "mean", Path(recipe.data.files["mean"]), tmp_path, 0.2)[-1]["ok"]
    taken.close()
