"""Every shipped recipe is right, documented, and starts; every method and codec has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from xutrain import registry
from xutrain.cli.app import run
from xutrain.families import FAMILIES
from xutrain.recipe import catalog
from xutrain.recipe.load import load

CONFIGS = Path(registry.__file__).parent.parent / "configs"
RECIPES = sorted(
    f"{verb}/{path.relative_to(CONFIGS / verb).with_suffix('')}" for verb in FAMILIES for path in (CONFIGS / verb).rglob("*.yaml")
)


def test_the_catalogue_sees_every_file() -> None:
    assert len(RECIPES) >= 50
    assert sorted(f"{r.verb}/{r.name}" for r in catalog.listing()) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_right(name: str) -> None:
    loaded = load(name)
    assert loaded.verb == name.split("/")[0]
    assert loaded.recipe.summary and loaded.recipe.smoke
    assert load(name, smoke=True).recipe.scale == "smoke"
    head = loaded.source.split("\n\n")[0].splitlines()
    assert head[0].startswith("# ") and any(f"xutrain {loaded.verb} --config" in line for line in head if line.startswith("#")), "header"


def test_every_codec_and_method_has_a_recipe() -> None:
    used = {"codec": set(), "method": set()}  # type: dict[str, set[tuple[str, str]]]
    for name in RECIPES:
        recipe = load(name).recipe
        used["method"].add((recipe.verb, recipe.method_name))
        if recipe.codec_name:
            used["codec"].add(("", recipe.codec_name))
    missing = [("codec", e.name) for e in registry.entries("codec") if ("", e.name) not in used["codec"] and e.name not in ("fp16", "bf16")]
    missing += [("method", f"{v}/{e.name}") for e in registry.entries("method") for v in e.verbs if (v, e.name) not in used["method"]]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name: str, tmp_path: Path) -> None:
    assert run([name.split("/")[0], "--config", name, "--smoke", "-q", "--json", "--out", str(tmp_path)]) == 0
