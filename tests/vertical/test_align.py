"""Private set intersection over TLS, and what ``doctor`` finds."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from tests.vertical.party_jobs import in_thread, join
from tests.vertical.test_parties import NAMES, job
from xutrain.launch import parties
from xutrain.loops.vertical_align import Alignment
from xutrain.methods.vertical.transports import identity


def test_alignment_finds_the_common_ids_in_one_order(tmp_path):
    recipe = job(tmp_path)
    lists = {"mean": ["a", "b", "c", "d"], "error": ["d", "x", "b", "a"], "worst": ["b", "q", "a", "d", "z"]}
    found: dict[str, Any] = {}

    sides = {p: Alignment(recipe, p, lists[p], identity.load(tmp_path, p), lambda text: None) for p in NAMES}
    join([in_thread(p, side.run, found) for p, side in sides.items()])
    assert sorted(found["mean"][0]) == ["a", "b", "d"]
    assert found["mean"][0] == found["error"][0] == found["worst"][0]
    assert found["worst"][1]["dropped"] == 2


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
