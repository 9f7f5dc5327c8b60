"""What the agent of a federated search believed over the rounds, as panels of a report: mean of its law with one deviation, and reward."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from xutrain.report.runs import Run
from xutrain.report.suite import Plot

MEAN, STD = "policy_mean_", "policy_std_"


def plots(runs: Iterable[Run]) -> list[Plot]:
    """One plot for every value that some run searched, aggregation weights of single clients left out; none without a search."""
    logged = list(dict.fromkeys(line["name"] for run in runs for line in run.lines if line.get("split") == "search"))
    names = [n.removeprefix(MEAN) for n in logged if n.startswith(MEAN) and "weight_" not in n]
    found = [Plot(y=f"{MEAN}{n}", x="round", title=f"Policy: {n.replace('_', ' ')}, mean and one deviation") for n in names]
    return [*found, *([Plot(y="reward", x="round", title="Reward of the round before")] if "reward" in logged else [])]


def deviation(runs: Iterable[Run], name: str, step: int) -> float | None:
    """Mean over the runs of the policy's own deviation, the band of a ``policy_mean_`` curve; None for other curves."""
    if not name.startswith(MEAN):
        return None
    known = [v for run in runs if (v := run.at(step, STD + name.removeprefix(MEAN))) is not None]
    return statistics.fmean(known) if known else None
