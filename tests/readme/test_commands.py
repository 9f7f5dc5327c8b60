"""Every command that README and docs show is one that works; README's own are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from xutrain import registry
from xutrain.cli.app import _route, run
from xutrain.families import FAMILIES
from xutrain.recipe import catalog
from xutrain.recipe.load import load
from xutrain.report import suite

ROOT = Path(registry.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_understood(page: str, command: str) -> None:
    """The command and all of its options exist, and suites, parts and kinds that it names are there. Nothing runs."""
    words = [w for w in shlex.split(command)[1:] if w not in ("[", "]", "...")]
    app, _, rest = _route(words)
    group = typer.main.get_command(app)
    try:
        _understood(group, rest)
    except click.exceptions.Exit:
        pass  # --help, --version
    except click.ClickException as error:
        raise AssertionError(f"{page}: {command}: {error.format_message()}") from None
    plain = [w for w in rest[1:] if not w.startswith("-")]
    if rest[0] == "sweep" and re.fullmatch(r"[a-z0-9_-]+", plain[0]):
        assert suite.select(plain[:1])
    if rest[0] == "show" and len(plain) == 2 and plain[0] in ("method", "codec", "dataset", "model") and plain[1] not in ("NAME", "mine"):
        assert registry.find(plain[0], plain[1], where=plain[0])


def _understood(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Parse a command line as click does, down to the last subcommand, without calling it."""
    context = command.make_context(command.name or "xutrain", list(words), parent=parent)
    if isinstance(command, click.Group):
        left = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, found, rest = command.resolve_command(context, left)
        assert found is not None, f"no such command: {name}"
        _understood(found, rest, context)


MADE = [(p.name, name) for p in PAGES for name in re.findall(r"^(?:    )?make ([a-z][\w-]*)", p.read_text(encoding="utf-8"), re.M)]


@pytest.mark.parametrize(("page", "target"), MADE)
def test_make_targets_exist(page: str, target: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    papers = suite.groups()
    kind, _, paper = target.partition("-")
    assert re.search(rf"^{re.escape(target)}:", text, re.M) or (kind in ("reproduce", "slurm") and paper in papers), (
        f"{page}: make {target}"
    )


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
