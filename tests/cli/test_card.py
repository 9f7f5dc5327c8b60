"""The cards of `xutrain show method NAME`: complete for every part of the package, and never of another part of the same name."""

from __future__ import annotations

import importlib
import json

import pytest

from xutrain import registry
from xutrain.cli import card
from xutrain.cli.app import run

PARTS = sorted({(kind, e.name, e.verbs) for kind in ("method", "codec", "agent") for e in registry.entries(kind)})


@pytest.mark.parametrize(("kind", "name", "verbs"), PARTS, ids=["-".join((k, *v, n)) for k, n, v in PARTS])
def test_every_header_has_an_equation_and_limits(kind: str, name: str, verbs: tuple[str, ...]) -> None:
    cls = registry.load(kind, name, verb=verbs[0] if verbs else None)
    text = importlib.import_module(cls.__module__).__doc__ or ""
    assert any(line.startswith("    ") for line in text.splitlines()), "no indented equation"
    assert card.equation(text) and card.limits(text)
    assert all(len(line) <= 140 for line in text.splitlines())


def _card(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert run(["show", *words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_codec_is_a_method_of_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert _card(capsys, "method", "orq") == _card(capsys, "codec", "orq")
    assert _card(capsys, "method", "BinGrad-b")["kind"] == "codec"
    assert _card(capsys, "method", "sgd", "--verb", "sparsify")["kind"] == "method"


def test_parts_of_one_name_keep_their_recipes_apart(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = _card(capsys, "method", "central"), _card(capsys, "method", "central", "--verb", "vertical")
    assert ours["verbs"] == ["federate"] and ours["also"] == ["vertical"] and "federate/central" in list(ours["recipes"])  # type: ignore[call-overload]
    assert theirs["recipes"] == ["vertical/central"] and theirs["also"] == [] and theirs["suites"] == []


def test_a_name_goes_before_an_alias_of_another_part(capsys: pytest.CaptureFixture[str]) -> None:
    found = _card(capsys, "method", "sgd")
    assert found["name"] == "sgd" and found["verbs"] == ["quantize"] and found["also"] == ["sparsify"]
    assert _card(capsys, "method", "sgd", "--verb", "vertical")["name"] == "afsgd"


def test_papers_without_a_number_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert [card.cited(p) for p in ("2002.11082", "Zhang et al. 2018")] == ["arXiv 2002.11082", "Zhang et al. 2018"]
    assert all(":" not in e.paper for kind in ("method", "codec", "agent", "model") for e in registry.entries(kind))
    assert run(["show", "method", "nothing_like_it"]) == 2
    assert "xutrain ls methods" in capsys.readouterr().err


def test_what_a_header_says() -> None:
    text = """X (arXiv 1, eq. 3): a step. It has no limit elsewhere.

    x = y
    y = z

Limits: x = 0 is SGD.
Two lines.
"""
    assert card.equation(text) == "X (arXiv 1, eq. 3): a step.\nx = y\ny = z"
    assert card.limits(text) == "x = 0 is SGD. Two lines."
    assert card.equation("Nothing.") == card.limits("Nothing.") == ""
