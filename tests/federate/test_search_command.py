"""What the command line and the report say of searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_federate_runs import recipe

from xutrain.cli.app import run
from xutrain.engine.context import Context
from xutrain.engine.record import Record, write_json
from xutrain.loops import federated
from xutrain.report import policy
from xutrain.report.runs import Run

AGENTS = ["discrete", "discrete_factorised", "fixed", "frozen", "gaussian", "mlp", "random"]


def output(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(list(words)) == 0
    return json.loads(capsys.readouterr().out)


def test_agents_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["name"] for row in output(capsys, "ls", "agents", "--json")] == AGENTS
    card = output(capsys, "show", "agent", "gaussian", "--json")
    assert {"lr", "cov", "init_std", "natural_gradient"} <= {o["option"] for o in card["options"]}
    assert {"lag", "window", "baseline", "rollouts", "space.lr.scale", "space.weights.form"} <= {o["option"] for o in card["search"]}
    assert "federate/auto_fedrl" in card["recipes"] and card["file"].endswith("search/gaussian.py")


def test_a_method_says_what_may_be_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"lr", "local_work", "weights", "beta", "server_lr"} <= set(output(capsys, "show", "method", "domo", "--json")["searchable"])


def test_the_report_draws_the_policy(tmp_path: Path) -> None:
    search = "{agent: gaussian, space: {lr: {low: 0.01, high: 0.4}, weights: {}}}"
    value = recipe("fedavg", **{"clients.val_fraction": 0.2, "search": search})
    ctx = Context(0)
    record = Record(tmp_path, ctx.meter)
    federated.run(value, ctx, record)
    record.close()
    write_json(tmp_path / "run.json", {"seed": 0})
    read = Run(tmp_path, {"seed": 0}, {"status": "done"})
    drawn = policy.plots([read])
    assert [p.y for p in drawn] == ["policy_mean_lr", "reward"]
    assert policy.deviation([read], "policy_mean_lr", 1) == pytest.approx(0.39 * 0.108)
    assert policy.deviation([read], "test_loss", 1) is None
