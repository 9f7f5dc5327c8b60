"""The agents on quadratic clients: the table of docs/federate-auto-fedrl.md, and what must hold on every seed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from quadratic_bed import agent, play

SMALL, WIDE = 85**-0.5, 85**-0.25
#: policy -> (agent, its options, oldest term only)
POLICIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "centre": ("", {}, False),
    "frozen": ("frozen", {"init_std": SMALL}, False),
    "cs": ("gaussian", {"init_std": SMALL}, False),
    "defect": ("gaussian", {"init_std": SMALL}, True),
    "frozen_wide": ("frozen", {"init_std": WIDE}, False),
    "cs_wide": ("gaussian", {"init_std": WIDE}, False),
}
#: mean excess over ten seeds and its standard error, as measured before on these streams
TABLE = {
    60: {"centre": (0.798, 0.087), "frozen": (0.747, 0.069), "cs": (0.138, 0.020), "defect": (0.325, 0.046),
         "frozen_wide": (1.081, 0.179), "cs_wide": (0.769, 0.102)},
    200: {"centre": (0.804, 0.085), "frozen": (0.737, 0.111), "cs": (0.032, 0.004), "defect": (0.033, 0.005),
          "frozen_wide": (0.939, 0.154), "cs_wide": (0.259, 0.042)},
}  # fmt: skip


@functools.cache
def excess(policy: str, rounds: int, seeds: int = 10) -> tuple[float, ...]:
    name, options, oldest = POLICIES[policy]
    return tuple(play(agent(name, **options) if name else None, s, rounds, oldest=oldest).excess for s in range(seeds))


@pytest.mark.parametrize("rounds", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", POLICIES)
def test_table(policy: str, rounds: int) -> None:
    mean, error = TABLE[rounds][policy]
    found = excess(policy, rounds)
    assert np.mean(found) == pytest.approx(mean, abs=error)
    assert np.std(found) / 10**0.5 == pytest.approx(error, rel=0.1)


def test_the_agent_learns() -> None:
    """Against its own frozen policy, the same random draws: on at least nine of ten seeds, by a factor of four at least."""
    pairs = list(zip(excess("cs", 60), excess("frozen", 60), strict=True))
    assert sum(a < b for a, b in pairs) >= 9
    assert np.exp(np.mean([np.log(a / b) for a, b in pairs])) < 0.25


def test_the_defect_of_the_public_window_costs() -> None:
    assert np.mean(excess("defect", 60)) >= 1.5 * np.mean(excess("cs", 60))


@pytest.mark.slow
def test_the_defect_costs_nothing_in_the_end() -> None:
    assert np.mean(excess("defect", 200)) < 1.5 * np.mean(excess("cs", 200))


def test_less_local_work_where_clients_drift() -> None:
    means = np.mean([play(agent("gaussian", init_std=SMALL), s, 60).means for s in range(10)], axis=0)
    assert means[0] == pytest.approx(-0.32, abs=0.05) and means[1] == pytest.approx(-0.26, abs=0.05)


def test_more_work_where_they_do_not() -> None:
    """All optima equal, no noise: the product of rate and steps is to go up."""
    means = np.mean([play(agent("gaussian", init_std=SMALL), s, 60, same=True, noise=0.0).means for s in range(5)], axis=0)
    assert means[0] + means[1] > 0.1


def test_the_network_learns_with_a_small_rate_and_a_head_of_zeros() -> None:
    """Six seeds: every one below its frozen run; with the public code's rate and head no better than frozen on the mean."""
    frozen = excess("frozen", 60)[:6]
    sound = [play(agent("mlp", seed=s, init_std=SMALL), s, 60).excess for s in range(6)]
    assert all(a < b for a, b in zip(sound, frozen, strict=True))
    assert np.mean(sound) < 0.5 * np.mean(frozen)


@pytest.mark.slow
def test_the_network_saturates_with_the_public_rate() -> None:
    runs = [play(agent("mlp", seed=s, init_std=SMALL, lr=0.01, zero_init_head=False), s, 60) for s in range(6)]
    assert np.mean([r.excess for r in runs]) > 0.9 * np.mean(excess("frozen", 60)[:6])
    assert np.mean([np.mean(np.abs(r.means[2:10]) > 0.49) for r in runs]) > 0.5


def test_rewards_telescope() -> None:
    """Sum of -ln(1 - r) is the log-ratio of the first and the last loss."""
    run = play(agent("gaussian"), 0, 30)
    assert sum(-np.log(1 - r) for r in run.rewards) == pytest.approx(np.log(run.losses[0] / run.losses[-1]), rel=1e-12)
