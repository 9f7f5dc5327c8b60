"""Numbers that take minutes (slow): the whole of T4, T13, T14 and T15, in virtual time, so no clock decides."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vertical.conftest import BC3
from tests.vertical.test_virtual_time import _time_to
from tests.vertical.vertical_sums import objective

pytestmark = pytest.mark.slow

TARGET = {"afsgd": (5e-3, 0.01, 12), "afsvrg": (1e-5, 0.03, 30), "afsaga": (1e-5, 0.03, 40)}


def _gain(name: str, parties: int, delay: float, barrier: bool = True, **free: object) -> float:
    """Virtual time of lock step divided by that of the asynchronous form; no full pass costs computing time."""
    target, lr, epochs = TARGET[name]
    shared = {
        "data": {"name": "breast_cancer", "parties": parties},
        "time": {"slow_party": "party1", "delay": delay, "full_pass": 0.0},
        "train__lr": lr,
        "train__epochs": epochs,
    }
    published = {"name": name, **({"snapshot": "barrier"} if name == "afsvrg" else {})}
    lock = _time_to(target, method=published, train__mode="sync", **shared)
    return lock / _time_to(target, method=published if barrier else {"name": name}, **shared, **free)


def test_t4_plateau_of_sgd_over_ten_seeds(run):
    """Mean gap of epochs 20 to 40 is proportional to the step: 4.14e-3, 1.87e-3, 9.5e-4 for 0.06, 0.03, 0.015."""
    means = []
    for lr in (0.06, 0.03, 0.015):
        gaps: list[float] = []

        def watch(job, gaps=gaps):
            if job.net.steps > 20 * 569 and job.net.steps % 569 == 0:
                gaps.append(objective(job) - BC3)

        for seed in range(10):
            run(watch, method={"name": "central"}, train__epochs=40, train__lr=lr, seed=seed)
        means.append(float(np.mean(gaps)))
    assert means == pytest.approx([4.14e-3, 1.87e-3, 9.5e-4], rel=0.35)
    assert 1.6 < means[0] / means[1] < 2.7
    assert 1.6 < means[1] / means[2] < 2.7


@pytest.mark.parametrize(("name", "parties"), [("afsvrg", 4), ("afsvrg", 8), ("afsaga", 4), ("afsaga", 8)])
def test_t13_a_shared_index_stream_needs_less_time(name, parties):
    target, lr, _ = TARGET[name]
    shared = {
        "data": {"name": "breast_cancer", "parties": parties},
        "method": {"name": name},
        "train__lr": lr,
        "train__epochs": 40,
        "train__budget": "total",
        "time": {"full_pass": 0.0},
    }
    ratio = _time_to(target, train__sampling="independent", **shared) / _time_to(target, train__sampling="shared", **shared)
    assert 1.05 < ratio < 2.0


@pytest.mark.parametrize(("name", "parties"), [("afsgd", 4), ("afsgd", 8), ("afsvrg", 4), ("afsvrg", 8), ("afsaga", 4)])
def test_t14_speed_up_without_illusions(name, parties):
    """At loose accuracy asynchrony wins, the more the slower the slow party; at tight accuracy it wins nothing, and loses little."""
    free = {} if name == "afsvrg" else {"train__budget": "total"}
    gains = [_gain(name, parties, delay, **free) for delay in (0.0, 0.3, 0.6, 1.0, 2.0)]
    assert min(gains) > 0.85
    if name == "afsgd":
        assert gains[-1] > gains[0]
        assert gains[3] > (1.4 if parties == 8 else 1.15)
    elif name == "afsvrg":
        assert max(gains) < 1.2


@pytest.mark.parametrize(("name", "parties", "least"), [("afsgd", 4, 2.0), ("afsvrg", 4, 1.5), ("afsvrg", 8, 1.5), ("afsaga", 4, 1.2)])
def test_t15_compensated_steps_restore_the_gain(name, parties, least):
    assert _gain(name, parties, 2.0, barrier=False, train__budget="total", train__rates="compensated") > least
