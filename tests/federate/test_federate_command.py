"""The command line of the federated family: the partition table and picture, and every shipped recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from xutrain.cli.data import app
from xutrain.loops import federated
from xutrain.recipe.load import load

RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "configs" / "federate").glob("*.yaml"))
OURS = [r for r in RECIPES if load(r, "federate").recipe.data.name in ("digits", "synthetic_images", "cifar10", "cifar100", "svhn")]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["partition", *arguments])


def test_the_partition_is_shown_as_table_picture_and_json(tmp_path: Path) -> None:
    picture = tmp_path / "deep" / "p.png"
    shown = call("--config", "domo", "partition.s=0.05", "--picture", str(picture))
    assert shown.exit_code == 0 and "similarity(s=0.05)" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    value = json.loads(call("--config", "domo", "--json", "--seed", "3").stdout)
    assert value["seed"] == 3 and len(value["clients"]) == 16
    assert sum(row["samples"] for row in value["clients"]) == value["samples"] == 1437
    assert all(sum(row["counts"]) == row["samples"] for row in value["clients"])


def test_the_table_is_what_a_run_trains_on() -> None:
    from xutrain.engine.context import Context

    value = json.loads(call("--config", "domo", "--json").stdout)
    job = federated.build(load("domo", "federate").recipe, Context())
    assert [row["samples"] for row in value["clients"]] == [len(s.train) for s in job.parts]


@pytest.mark.parametrize("arguments", [(), ("--config", "domo", "partition.s=2"), ("--config", "domo", "--picture", "p.gif")])
def test_faults_are_named(arguments: tuple[str, ...]) -> None:
    from xutrain.errors import XutrainError

    result = call(*arguments)
    assert isinstance(result.exception, XutrainError) and result.exception.exit_code == 2


@pytest.mark.parametrize("name", OURS)
def test_every_recipe_is_valid_and_its_smoke_can_be_forecast(name: str) -> None:
    load(name, "federate")
    predicted = federated.forecast(load(name, "federate", smoke=True).recipe)
    assert predicted.steps >= 1
    assert name in ("central", "local") or predicted.up > 0


@pytest.mark.slow
def test_ordering_on_real_digits(tmp_path: Path) -> None:  # T13
    from xutrain.engine.context import Context
    from xutrain.engine.record import Record

    means = {}
    for name in ("fedavg", "fedavg_slm_z", "domo"):
        found = []
        for seed in range(4):
            recipe = load(name, "federate", seed=seed).recipe
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            ctx = Context(seed)
            record = Record(folder, ctx.meter)
            found.append(federated.run(recipe, ctx, record)["mean_test_accuracy"])
            record.close()
        means[name] = sum(found) / 4
    assert means["fedavg"] + 0.005 < means["fedavg_slm_z"]
    assert means["fedavg_slm_z"] + 0.005 < means["domo"]
