"""Every command that README and docs show is one that works; README's own are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from xutrain import registry
from xutrain.cli.app import run
from xutrain.families import FAMILIES
from xutrain.recipe import catalog
from xutrain.recipe.load import load

ROOT = Path(registry.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands(page: Path) -> list[str]:
    """Lines that begin with ``xutrain`` inside code blocks, fenced or indented, without their remarks."""
    found, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and line.strip().startswith("xutrain "):
            found += [part.strip() for part in re.split(r"\s#\s|\s{3,}or\s{3,}", line.strip())[0].split("&&")]
    return [c for c in found if c.startswith("xutrain ")]


COMMANDS = [(page.name, command) for page in PAGES for command in _commands(page)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_names_what_exists(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if "--config" not in words or words[0] not in FAMILIES or words[1] != "--config":
        return
    if "codec=mine" in words:  # the codec that the page tells a reader to write
        return
    config, overrides = words[2], [w for w in words[3:] if "=" in w and not w.startswith("-") and not re.match(r"^\S*[A-Z]{3,}", w)]
    if config.endswith(".yaml") and not any(config.removesuffix(".yaml") == r.name for r in catalog.listing(words[0])):
        return  # a reader's own file
    assert load(config, words[0], overrides).verb == words[0]


@pytest.mark.parametrize("command", [c for p, c in COMMANDS if p == "README.md"])
def test_readme_commands_run(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    if words[0] in FAMILIES:
        words += ["--smoke", "--out", str(tmp_path)]
    elif words[0] in ("sweep", "report"):
        words = ["sweep", "demo", "--dry-run", "--out", str(tmp_path)]
    elif words[:2] == ["data", "prepare"] or "NAME" in words:
        return
    elif words[0] == "cp":
        words[2] = str(tmp_path / words[2])
    assert run(words) == 0, capfd.readouterr().err


def test_readme_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
