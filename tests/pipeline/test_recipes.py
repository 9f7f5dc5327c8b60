"""Every shipped recipe of the verb is valid; the small ones run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.conftest import watch
from xutrain.recipe.load import load

FOLDER = Path(__file__).parent.parent.parent / "configs" / "pipeline"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_the_catalogue_is_whole() -> None:
    methods = {load(str(path), "pipeline").recipe.method_name for path in RECIPES}
    assert methods == {"dsp", "bp", "fr", "ddg", "dni", "pipedream", "fdg", "pipemare", "gpipe", "1f1b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid(path: Path) -> None:
    for smoke in (False, True):
        recipe = load(str(path), "pipeline", smoke=smoke).recipe
        assert recipe.summary
        assert recipe.method.delays(recipe.stages).stages == recipe.stages  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["dsp", "dsp_resnet", "dsp_c10_resnet98", "dsp_c10_resnext29", "dsp_imagenet_resnet18"])
def test_smoke(tmp_path: Path, name: str) -> None:
    recipe = load(str(FOLDER / f"{name}.yaml"), "pipeline", ["train.steps=2"], smoke=True).recipe
    assert watch(recipe, tmp_path).metrics["test_accuracy"] >= 0  # type: ignore[attr-defined]
