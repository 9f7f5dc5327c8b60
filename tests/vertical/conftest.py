"""Small vertical jobs that tests run to their end or step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xutrain.engine.context import Context
from xutrain.launch.parties import reserved_ports
from xutrain.loops import vertical
from xutrain.recipe.load import from_dict

_HELD = contextlib.ExitStack()
BC3 = 0.10241656575570418  # optimum of breast cancer, l2 0.01, no intercept


def recipe_of(**changes: Any) -> Any:
    """Breast cancer with three label holders; a dotted key changes one value."""
    raw: dict[str, Any] = {
        "data": {"name": "breast_cancer"},
        "method": {"name": "afsgd"},
        "labels": "all",
        "train": {"epochs": 2, "lr": 0.03, "weight_decay": 0.01},
        "security": {"mode": "plain"},
        "time": {},
        "eval": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            raw[section][name] = value
        else:
            raw[section] = value
    return from_dict("vertical", raw)


def run_through(recipe: Any, watch: Callable[[Any], None] | None = None) -> Any:
    """The finished job of a recipe; ``watch(job)`` after every event."""
    job = vertical.build(recipe, Context(recipe.seed))
    for seat in job.seats:
        seat.begin(job.net)
    while job.net.step():
        if watch:
            watch(job)
    return job


@pytest.fixture
def run() -> Callable[..., Any]:
    """``run(**changes)``: the finished job and its recipe."""

    def go(watch: Callable[[Any], None] | None = None, **changes: Any) -> Any:
        recipe = recipe_of(**changes)
        return run_through(recipe, watch), recipe

    return go


def ports(count: int) -> list[int]:
    """Ports that nobody else gets before the end of the test."""
    return _HELD.enter_context(reserved_ports(count))


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    _HELD.close()
