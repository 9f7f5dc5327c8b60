"""Recipes and overrides from a seeded grammar, all wrong: exit code 2, an `error:` line, no stack trace, nothing executed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from xutrain.cli.app import run

#: verb, recipe, keys that hold a number, keys that hold a section
TARGETS = [
    ("quantize", "orq", ["train.steps", "train.batch_size", "workers", "optimizer.lr", "eval.every", "seed", "checkpoint.keep"]),
    ("sparsify", "def", ["train.batch_size", "workers", "optimizer.lr", "seed", "checkpoint.keep"]),
    ("federate", "domo", ["clients.count", "clients.fraction", "train.rounds", "train.lr", "train.batch_size", "eval.every", "seed"]),
    ("pipeline", "dsp", ["seed", "checkpoint.keep", "threads"]),
    ("vertical", "afsgd", ["seed", "checkpoint.keep", "threads"]),
    ("pretrain", "dsm", ["seed", "checkpoint.keep", "workers"]),
    ("prune", "moe_pruner", ["seed", "checkpoint.keep", "threads"]),
    ("federate", "auto_fedrl", ["search.window", "search.rollouts", "search.reward_clip", "search.lag", "clients.val_fraction", "seed"]),
    ("federate", "fedsm", ["clients.count", "train.rounds", "train.lr", "eval.every", "checkpoint.keep", "seed"]),
]
SECTIONS = ["data", "model", "checkpoint", "log", "paper"]
TEXTS = ["many", '""', "[1, 2]", "{a: 1}", "[[[]]]", "3.7.1", "1e", "--1", "0x1f", "nan0", "null null", "two words", "\\u0000", "<script>"]
NOT_NUMBERS = [*TEXTS, ".inf", "-.inf", ".nan", "1e999", "9" * 50, "-1", "true", "1.5", "1" + "0" * 30, "٣", "NaN", "Infinity"]
BROKEN = [
    "seed: [1",
    "seed: {a: 1",
    "seed: 'open",
    "\tseed: 1",
    "seed: 1\n  bad: 2",
    "seed: 1\nseed: 2",
    "? [a]\n: 1",
    "a: &a [1]\nb: [*a, *a]",
    "&x a: 1",
    "seed: !!python/name:os.system",
    "seed: !!python/object/apply:os.system ['touch {canary}']",
    "seed: !!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "seed: !custom 1",
    "seed: !!binary aGk=",
    "--- 1\n--- 2",
    "- 1\n- 2",
    "plain words",
    "1: 2",
    "null: 1",
    "[a]: 1",
    "x: " + "[" * 5000,
    "x: " + "{a: " * 5000,
    "%YAML 9.9\n---\nseed: 1",
    "@seed: 1",
    "seed: `1`",
    "extends: ../../../../etc/passwd",
    "extends: [base/digits.yaml, 3]",
    "extends: {a: 1}",
    "extends: mine.yaml",
    "verb: [quantize]",
    "verb: {a: 1}",
    "verb: 3",
    "smoke: [1]\nnothing: 1",
    "plugins: no_such_module",
    "plugins: [no_such_module]",
    "plugins: [3]",
    "plugins: ['']",
    "plugins: ['.']",
    "plugins: ['../x']",
    "extends: " + "x" * 5000,
    "plugins: ['-']",
]


def _value(rng: random.Random) -> str:
    return rng.choice(NOT_NUMBERS)


def _unknown(rng: random.Random) -> str:
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz_") for _ in range(rng.randint(1, 12)))
    return f"zz{word}"


def _override(rng: random.Random, keys: list[str]) -> list[str]:
    """One override that cannot be right."""
    kind = rng.randrange(9)
    if kind == 0:
        return [f"{rng.choice(keys)}={_value(rng)}"]
    if kind == 1:
        return [f"{_unknown(rng)}={_value(rng)}"]
    if kind == 2:
        return [f"{rng.choice(SECTIONS)}.{_unknown(rng)}=1"]
    if kind == 3:
        return [f"{rng.choice(['data', 'model', 'method'])}={_unknown(rng)}"]
    if kind == 4:
        return [rng.choice(["=", "=1", ".=1", "a..b=1", "train.=1", ".seed=1", "seed", " ", "=seed=", "a b"])]
    if kind == 5:
        wrong = ["3", "[]", "[a]", "true", "{}", "{name: 3}", "{name: [a]}", "{name: null}"]
        return [f"{rng.choice(['data', 'model', 'method'])}={rng.choice(wrong)}"]
    if kind == 6:
        return [f"seed.{_unknown(rng)}=1"]
    if kind == 7:
        return [f"{rng.choice(keys)}={{{_unknown(rng)}: {_value(rng)}}}"]
    return [f"seed={rng.choice(BROKEN[:3])}", f"{_unknown(rng)}=1"]


def _check(arguments: list[str], capfd: pytest.CaptureFixture[str], canary: Path) -> str:
    code = run(arguments)
    text = capfd.readouterr()
    assert code == 2, f"{arguments}: exit code {code}\n{text.err[-600:]}"
    shown = text.err
    assert "error:" in shown.lower(), f"{arguments}: {shown!r}"
    assert "Traceback" not in shown and not canary.exists(), arguments
    return shown


@pytest.mark.parametrize("part", range(len(TARGETS)))
def test_overrides(part: int, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, recipe, keys = TARGETS[part]
    for number in range(40):
        rng = random.Random(1000 * part + number)
        # numbers that a key may well hold are made wrong by an unknown key beside them
        over = _override(rng, keys)
        if rng.random() < 0.3 or over[0].split("=")[-1] in ("1.5", "9" * 50, "1" + "0" * 30, "٣", "-1", "{}"):
            over.append(f"{_unknown(rng)}=1")
        _check([verb, "--config", recipe, "--dry-run", "--out", str(tmp_path), "--", *over], capfd, tmp_path / "canary")


def test_files(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Broken texts alone and behind a sound beginning, and 200 sound recipes with bytes or lines damaged."""
    path, canary = tmp_path / "mine.yaml", tmp_path / "canary"
    head = "extends: base/digits.yaml\nworkers: 4\ncodec: {name: orq, levels: 3}\n"
    arguments = ["quantize", "--config", str(path), "--dry-run", "--out", str(tmp_path / "runs")]
    for broken in BROKEN:
        for text in (broken, head + broken):
            path.write_text(text.replace("{canary}", str(canary)), encoding="utf-8")
            _check(arguments, capfd, canary)
    damage: list[Callable[[random.Random, bytes], bytes]] = [
        lambda rng, b: b[: (at := rng.randrange(len(b)))] + bytes([rng.choice([0xFF, 0xC0, 0x80, 0xFE])]) + b[at:],
        lambda rng, b: b[: (at := rng.randrange(len(b)))] + bytes([rng.choice([0, 1, 7, 27])]) + b[at:],
        lambda rng, b: b + b"\n" + rng.choice([b"workers: 3\n", b"codec: orq\n", b"  x: 1\n", b"]\n", b"}\n", b"'\n", b"*a\n"]),
        lambda rng, b: b + f"{_unknown(rng)}: {_value(rng)}\n".encode(),
        lambda rng, b: b.replace(b": ", rng.choice([b":", b"::", b" = ", b"=> "])),
    ]
    for number in range(200):
        rng = random.Random(number)
        path.write_bytes(rng.choice(damage)(rng, head.encode()))
        _check(arguments, capfd, canary)


def test_bombs(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A billion laughs, a file of megabytes, a device, a folder."""
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    path.write_text("\n".join(lines))
    assert "anchors and aliases" in _check(["quantize", "--config", str(path)], capfd, tmp_path / "canary")
    path.write_text("a: " + "x" * (2 << 20))
    assert "larger than" in _check(["quantize", "--config", str(path)], capfd, tmp_path / "canary")
    _check(["quantize", "--config", str(tmp_path)], capfd, tmp_path / "canary")
    _check(["quantize", "--config", "\x00"], capfd, tmp_path / "canary")
    _check(["quantize", "--config", "x" * 5000], capfd, tmp_path / "canary")
