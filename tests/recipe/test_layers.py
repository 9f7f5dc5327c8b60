"""How recipes are laid over one another, and what makes two runs the same experiment."""

from __future__ import annotations

import pytest

from xutrain.errors import RecipeError
from xutrain.recipe import yamlfile
from xutrain.recipe.catalog import lay_over
from xutrain.recipe.identity import group_id
from xutrain.recipe.load import apply, load


def test_mappings_merge_lists_are_replaced() -> None:
    assert lay_over({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 1}


def test_another_name_starts_from_its_own_defaults() -> None:
    base = {"codec": {"name": "orq", "levels": 9}}
    assert lay_over(base, {"codec": {"name": "terngrad"}}) == {"codec": {"name": "terngrad"}}
    assert lay_over(base, {"codec": {"levels": 3}}) == {"codec": {"name": "orq", "levels": 3}}
    assert lay_over({"codec": "orq"}, {"codec": {"levels": 3}}) == {"codec": {"name": "orq", "levels": 3}}


def test_overrides_follow_the_same_rules_in_any_order() -> None:
    raw = {"codec": {"name": "orq", "levels": 9}}
    apply(raw, ["codec.clip=2.5", "codec.name=terngrad"])
    assert raw == {"codec": {"name": "terngrad", "clip": 2.5}}
    raw = {"model": "mlp"}
    apply(raw, ["model.hidden=[3, 4]", "seed=", "train.clip_norm=null"])
    assert raw == {"model": {"name": "mlp", "hidden": [3, 4]}, "seed": None, "train": {"clip_norm": None}}


def test_identity() -> None:
    orq = load("quantize/orq").recipe
    assert group_id(orq) == group_id(load("quantize/orq", seed=7).recipe)
    assert group_id(orq) == group_id(load("quantize/orq", overrides=["log.every=1", "checkpoint.every=5", "summary=other"]).recipe)
    assert group_id(orq) == group_id(load("quantize/orq", overrides=["optimizer.lr=1e-1", "codec.levels=9"]).recipe)
    assert group_id(orq) != group_id(load("quantize/orq", overrides=["optimizer.lr=0.2"]).recipe)
    assert group_id(orq) != group_id(load("quantize/orq", smoke=True).recipe)


def test_resolved_recipes_read_back_to_themselves() -> None:
    orq = load("quantize/orq").recipe
    assert yamlfile.parse(yamlfile.dump(orq.model_dump(mode="json")), "x") == orq.model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000),
        ("1.5e3", 1500.0),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("012", 12),
        ("1_000", 1000),
        ("-.5", -0.5),
        ("~", None),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("+3", 3),
        ("1e", "1e"),
        (".", "."),
        ("-", "-"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    if text == "-":
        with pytest.raises(RecipeError):
            yamlfile.parse("a: - b: [", "x")
        return
    parsed = yamlfile.parse(f"a: {text}", "x")["a"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999", "9" * 50])
def test_numbers_that_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        yamlfile.parse(f"a: {text}", "x")


@pytest.mark.parametrize("text", ["1e3", "12345e6", "+1E5", "-e3", "123e4567", "1_0.5", "off", "012", "1:30", "null", "", "- x", "5."])
def test_texts_that_look_like_something_else_are_written_in_quotes(text: str) -> None:
    value = {"a": text, "b": [text], text or "k": 1, "n": 1e-5, "m": 1e22}
    assert yamlfile.parse(yamlfile.dump(value), "x") == value


@pytest.mark.parametrize("text", ["-e3", "+e5", "._1", "-.e1"])
def test_a_number_has_a_digit_before_its_exponent(text: str) -> None:
    assert yamlfile.parse(f"a: {text}", "x") == {"a": text}
