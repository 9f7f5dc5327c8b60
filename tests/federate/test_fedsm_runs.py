"""Segmentation of several sites as whole runs: any number of processes, stop and resume, bits, tables, pictures, bad input."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.federate.test_federate_runs import equal, train_recipe
from xutrain.engine.context import Context
from xutrain.errors import RecipeError, Stopped
from xutrain.loops import federated, site_eval, site_pictures, site_tables
from xutrain.loops.clients import ClientData, shards
from xutrain.recipe.load import from_dict

PERSONAL = ("softpull", "ditto", "fedper", "fedrep", "apfl", "l2gd", "prr_fl", "fedavg_finetune")


def recipe(method: str = "fedsm", **changes: Any) -> Any:
    mapping: dict[str, Any] = {
        "data": {
            "name": "medical_synthetic",
            "size": 16,
            "sites": 3,
            "unseen": 1,
            "samples": [4, 6, 8],
            "val_samples": 2,
            "test_samples": 3,
        },
        "model": {"name": "unet", "channels": [2, 4], "strides": [2], "res_units": 1},
        "partition": {"name": "by_site"},
        "clients": {"count": 3, "steps": "own"},
        "train": {"rounds": 3, "batch_size": 4, "lr": 0.01, "optimizer": "adam"},
        "eval": {"batch_size": 5, "every": 2, "overlays": 0, "hausdorff": False},
        "log": {"every": 1},
        "method": {"name": method},
    }
    if method == "fedsm":
        mapping["method"] |= {"selector": "small", "selector_lr": 0.01}
    if method == "fedbn":
        mapping["model"]["norm"] = "batch"
    return from_dict("federate", mapping, overrides=[f"{key}={value}" for key, value in changes.items()])


CASES: list[tuple[str, dict[str, Any]]] = [
    ("fedsm", {"eval.overlays": 1, "eval.hausdorff": True}),
    ("fedsm", {"method.selector_optimizer": "none", "method.selector_epochs": 2, "method.gamma": 0.3}),
    (
        "fedsm",
        {
            "method.selector_optimizer": "server_adam",
            "method.inference": "ensemble",
            "method.gamma_quantile": 0.3,
            "train.reset_optimizer": True,
        },
    ),
    ("fedsm", {"method.mode": "extra", "method.selector_rounds": 1, "method.finetune_epochs": 2}),
    ("fedsm", {"clients.fraction": 0.7, "method.softpull_weights": "size", "clients.weights": "samples"}),
    (
        "fedsm",
        {
            "data.dims": 3,
            "data.samples": 2,
            "data.val_samples": 1,
            "data.test_samples": 2,
            "train.batch_size": 2,
            "train.rounds": 2,
            "method.slices": 3,
        },
    ),
    ("fedbn", {}),
    *((name, {}) for name in PERSONAL),
    ("fedavg", {}),
    ("local", {"method.local_momentum": 0.0}),
    ("central", {"method.local_momentum": 0.0}),
    *((name, {}) for name in ("fedprox", "scaffold", "fednova", "fedadam")),
    ("fedavg", {"data.structures": 2, "eval.sites": "all"}),
]


def run(folder: str, case: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return train_recipe(folder, recipe(case[0], **case[1]))


#: cases of which each takes another way between processes
SPREAD = [i for i, (name, _) in enumerate(CASES) if i in (0, 2, 5) or name in ("fedbn", "softpull", "ditto", "central")]


def _processes(folder: str, cases: list[int]) -> list[dict[str, Any]]:
    out = []
    for i in cases:
        found = run(f"{folder}/{i}", CASES[i])
        out.append({k: found[k] for k in ("metrics", "meter")} | {"shared": found["saved"].shared})
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, _processes(str(folder), list(range(len(CASES))))


def test_three_processes_give_the_same_bits(tmp_path: Path, alone: Any, forked: Any) -> None:
    folder, found = alone
    spread = forked(_processes, 3, str(tmp_path), SPREAD)
    for i, *others in zip(SPREAD, *spread, strict=True):
        for other in others:
            assert equal(found[i], other), CASES[i]
        for table in ("dice.csv", "dice.json", "dice.md"):
            assert (folder / str(i) / "artefacts" / table).read_bytes() == (tmp_path / str(i) / "artefacts" / table).read_bytes()


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}{i}")
def test_forecast_equals_the_meter(i: int, alone: Any) -> None:
    predicted = federated.forecast(recipe(CASES[i][0], **CASES[i][1]))
    parts = {name: {"up": up, "down": down} for name, (up, down) in alone[1][i]["meter"].items()}
    assert predicted.details["parts"] == parts
    assert (predicted.up, predicted.down) == (sum(p["up"] for p in parts.values()), sum(p["down"] for p in parts.values()))


@pytest.mark.parametrize("i", range(7), ids=lambda i: f"{CASES[i][0]}{i}")
def test_stop_and_resume_leave_no_trace(i: int, tmp_path: Path, alone: Any) -> None:  # F10
    for at in (1, 2):
        if at < recipe(CASES[i][0], **CASES[i][1]).train.rounds:
            (tmp_path / "STOP").write_text(str(at))
            with pytest.raises(Stopped):
                run(str(tmp_path), CASES[i])
    (tmp_path / "STOP").unlink()
    resumed = run(str(tmp_path), CASES[i])
    whole = alone[1][i]
    assert equal(whole["metrics"], resumed["metrics"]) and equal(whole["meter"], resumed["meter"])
    assert equal(whole["shared"], resumed["saved"].shared)
    if CASES[i][0] == "fedsm" and i == 0:
        shared, kept = resumed["saved"].shared["server"], resumed["saved"].worker(1)["state"]
        assert {"model", "personal", "selector", "moments", "best"} <= set(shared) and len(shared["personal"]) == 3
        assert set(kept) == {"adam_model", "adam_personal"}, "the selector's moments come back with the next plan"


def test_what_a_run_leaves(alone: Any) -> None:
    folder, found = alone
    artefacts = folder / "0" / "artefacts"
    rows = list(csv.DictReader((artefacts / "dice.csv").open()))
    assert len(rows) == 12 and {r["site"] for r in rows} == {"alder", "birch", "cedar", "grove"}
    assert {r["seen"] for r in rows if r["site"] == "grove"} == {"0"}
    summary = json.loads((artefacts / "dice.json").read_text())
    assert summary["synthetic"] and len(summary["cases"]) == 12 and len(summary["selector"]) == 4
    assert set(summary["sites"][0]["dice"]) == {"count", "mean", "q1", "median", "q3"}
    assert {r["hd95_mm"] for r in rows} == {""} and any(r["hd95"] for r in rows), "generated images have no millimetres"
    cases = list(csv.DictReader((artefacts / "cases.csv").open()))
    whole, mean = ([float(row[key]) for row in cases] for key in ("whole", "mean"))
    assert whole == pytest.approx(mean, abs=1e-6), "one image a case: the same Dice"
    assert summary["sites"][0]["whole_cases"]["mean"] == pytest.approx(summary["sites"][0]["dice"]["mean"], abs=1e-6)
    assert set(summary["selector"][0]["followed_above"].values()) == {0.9} and "ensemble" in summary["models"]
    own = json.loads((folder / "2" / "artefacts" / "dice.json").read_text())["selector"][0]["followed_above"]
    assert list(own) == ["alder", "birch", "cedar"] and 0.9 not in own.values() and all(0 < g < 1 for g in own.values())
    for row in summary["selector"]:
        assert sum(row["likely"].values()) == sum(row["sent"].values()) == 3
    for name in ("alder", "grove"):
        assert (artefacts / f"overlay-{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (artefacts / "dice.md").read_text()
    assert "Synthetic" in text and "Dice of every model on every site" in text
    metrics = found[0]["metrics"]
    for name in ("test_dice", "test_dice_seen", "test_dice_unseen", "test_dice_site_birch", "test_selector_accuracy", "test_routed_global",
                 "test_dice_with_oracle", "test_dice_with_global", "test_dice_with_ensemble", "test_dice_gamma_0.9", "test_hd95",
                 "test_dice_cases"):  # fmt: skip
        assert name in metrics, name
    assert found[2]["metrics"]["test_dice"] == found[2]["metrics"]["test_dice_with_ensemble"]
    assert metrics["test_dice"] == metrics["test_dice_gamma_0.9"] == metrics["test_dice_seen"]
    assert metrics["test_dice_gamma_1"] == metrics["test_dice_with_global"] and metrics["test_routed_gamma_1"] == 1
    local = found[[c[0] for c in CASES].index("local")]["metrics"]
    assert "test_dice_cross" in local and local["test_dice_cross"] != local["test_dice_seen"]
    assert "test_dice_objects" in found[-1]["metrics"]


def test_full_averaging_is_fedavg(tmp_path: Path) -> None:  # F4 on a real net, SGD and equal steps
    same = {"train.optimizer": "sgd", "clients.steps": "equal", "data.val_samples": 0, "data.samples": 4}
    one = run(str(tmp_path / "a"), ("fedsm", {**same, "method.lam": 1 / 3}))["saved"].shared["server"]
    other = run(str(tmp_path / "b"), ("fedavg", same))["saved"].shared["server"]
    assert torch.allclose(one["model"], other["model"], atol=1e-6)
    assert all(torch.allclose(m, one["model"], atol=1e-6) for m in one["personal"])


def test_gamma_one_is_the_global_model(tmp_path: Path) -> None:  # F2
    always = run(str(tmp_path / "a"), ("fedsm", {"method.gamma": 1.0}))
    shared = run(str(tmp_path / "b"), ("fedsm", {"method.inference": "shared"}))
    read = [(Path(tmp_path / x) / "artefacts" / "dice.csv").read_text() for x in "ab"]
    assert read[0] == read[1] and always["metrics"]["test_dice"] == shared["metrics"]["test_dice"]


def test_the_selectors_share_of_the_traffic() -> None:
    """The paper's three clients: 1.558 GB each way and round, of which the selector is 99.2 %."""
    from xutrain.methods.federate.base import Federation, Round
    from xutrain.methods.federate.fedsm import FedSM

    federation = Federation(3, (1 / 3,) * 3, networks={"selector": torch.empty(128_777_475, device="meta")})
    traffic = FedSM(FedSM.Options(name="fedsm", select=False), federation).traffic_in(Round(1, 1e-3, (0,), (1,), (1.0,)), 1_624_844)
    up = sum(traffic.up.values())
    assert up == sum(traffic.down.values()) == 2 * 1_624_844 + 3 * 128_777_475
    assert round(4 * up / 1e9, 3) == 1.558
    assert round(3 * 128_777_475 / up, 3) == 0.992


def test_a_site_that_several_clients_share_has_no_owner() -> None:
    job = federated.build(recipe("softpull", **{"partition.name": "iid", "clients.steps": "equal", "train.batch_size": 2}), Context())
    assert site_eval.owners(job) == {} and (site_eval.owner_of_samples(job, "test") == site_eval.SHARED).all()


def test_a_picture_of_a_volume_is_one_slice() -> None:
    """Structures that are largest on different slices are shown on the same one, and on that slice of the image."""
    truth = torch.zeros(2, 4, 6, 6)
    truth[0, 1, :3] = truth[1, 2, :5] = 1
    image = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 6)
    picture, wanted, found = site_pictures.flat(image, truth, truth > 0)
    assert picture.shape == (1, 6, 6) and float(picture.mean()) == 2
    assert not wanted[0].any() and int(wanted[1].sum()) == 30 and torch.equal(found, wanted > 0)


def test_validation_samples_are_cut_by_cases() -> None:
    """Slices of one volume never stand in both parts; the part may be larger than asked for, never smaller."""
    names = [f"p{i // 4}" for i in range(20)] + [f"q{i // 3}" for i in range(12)]
    parts = [np.arange(20)[::-1].copy(), np.arange(20, 32)]
    chosen = recipe(**{"clients.val_fraction": 0.3})
    for seed in range(5):
        made = shards(parts, chosen.clients, chosen.train, seed, cases=names)
        for shard, sizes in zip(made, ((8, 12), (6, 6)), strict=True):
            assert (len(shard.val), len(shard.train)) == sizes
            assert not {names[i] for i in shard.val} & {names[i] for i in shard.train}
    with pytest.raises(RecipeError, match="0 training samples"):
        shards([np.arange(8)], chosen.clients, chosen.train, 0, cases=["one"] * 8)


def test_dice_of_whole_cases() -> None:
    """Pixels add up over the slices; cases without truth, and slices that several models speak for, have none."""
    counts = torch.tensor([[[3.0, 4, 6]], [[0, 5, 0]], [[1, 1, 9]], [[0, 3, 0]], [[math.nan] * 3]])
    found = site_eval.of_cases(counts, ["a", "a", "b", "c", "d"])
    assert found["a"] == [pytest.approx(2 * 3 / 15)] and found["b"] == [pytest.approx(0.2)]
    assert found["c"][0] != found["c"][0] and found["d"][0] != found["d"][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_leaves_weight_decay_clipping_and_precision_as_they_are(precision: str) -> None:
    """The taught gradient at a model that is its own teacher is the plain one: the divergence has its minimum there."""
    more = {"train.weight_decay": 0.3, "train.clip_norm": 0.5, "train.precision": precision}
    built = federated.build(recipe("prr_fl", **more), Context(0))
    client = ClientData(built.bench, 0, built.parts[0], 0)
    point = built.server["model"]
    plain = client.gradient(point, 0).clone()
    assert torch.allclose(client.taught_gradient(point, point, 0), plain, atol=1e-6)


def test_distances_and_quartiles() -> None:
    truth = torch.zeros(2, 1, 12, 12)
    truth[0, 0, 2:6, 2:6] = 1
    moved = torch.zeros_like(truth)
    moved[0, 0, 2:6, 5:9] = 1
    far = site_tables.hausdorff(moved > 0, truth)
    assert far[0] == [3.0] and far[1][0] != far[1][0]
    gaps = torch.tensor([[2.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
    assert site_tables.hausdorff(moved > 0, truth, gaps)[0] == [1.5]
    assert math.isnan(site_tables.hausdorff(moved > 0, truth, gaps * math.nan)[0][0])
    assert site_tables.quartiles([0.0, 1.0, 2.0, 3.0, 4.0]) == {"count": 5, "mean": 2.0, "q1": 1.0, "median": 2.0, "q3": 3.0}
    assert site_tables.quartiles([])["mean"] is None and site_tables.quartiles([0.5])["q3"] == 0.5


@pytest.mark.parametrize(
    ("method", "changes", "where", "word"),
    [
        ("fedsm", {"method.lam": 1.5}, "method.lam", "at most 1"),
        ("fedsm", {"method.gamma": -0.1}, "method.gamma", "at least 0"),
        ("fedsm", {"codec": "orq"}, "codec.name", "sends whole models"),
        ("fedsm", {"model.norm": "batch"}, "model", "running statistics"),
        ("fedsm", {"method.selector": "vgg11"}, "data.size", "at least 32"),
        ("fedsm", {"clients.count": 2}, "clients.count", "3 sites"),
        ("fedavg", {"data.unseen": 0, "eval.sites": "unseen"}, "eval.sites", "every site"),
        ("fedper", {"method.head": "[nothing.*]"}, "method.head", "no parameter"),
        ("fedper", {"method.head": "['*']"}, "method.head", "every parameter"),
        ("local", {}, "method.local_momentum", "on top of local Adam"),
        ("mime", {}, "train.optimizer", "prescribes its local steps"),
        ("fedsm", {"data": "digits", "partition.name": "iid", "model": "mlp"}, "data.name", "none"),
    ],
)
def test_bad_input_is_named_before_the_first_round(tmp_path: Path, method: str, changes: dict[str, Any], where: str, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        run(str(tmp_path), (method, changes))
    assert where in [issue.where for issue in caught.value.issues]
    assert word in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_fedbn_without_norm_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="FedBN is FedAvg"):
        run(str(tmp_path), ("fedbn", {"model.norm": "instance"}))
