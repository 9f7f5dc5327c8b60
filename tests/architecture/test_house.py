"""The rules of the house that a test can hold: sizes, layers, who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from xutrain import registry

PACKAGE = Path(registry.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
#: who stands above whom; imports point downward only
LAYERS = ["cli", "launch", "worker", "loops", "methods", "engine"]


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, inside functions too; what only type checkers read does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for n in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "two ideas in one file?"
    room, imports = _room(path), _imports(path)
    if "torch.distributed" in imports or "torch.distributed.pipelining" in imports:
        assert room in ("engine", "launch", "hooks"), "torch.distributed belongs to engine/ and launch/"
    if "wandb" in imports:
        assert path.name in ("sinks.py", "export.py")
    if room in ("report", "recipe"):
        assert not any(i == "torch" or i.startswith("torch.") for i in imports), f"{room}/ is free of torch"
    if room in LAYERS:
        above = LAYERS[: LAYERS.index(room)]
        wrong = {i for i in imports for a in above if i == f"xutrain.{a}" or i.startswith(f"xutrain.{a}.")}
        # a loop's forecast is a value of the launch layer, and the worker is what a launcher starts
        wrong -= {i for i in wrong if i.startswith("xutrain.launch.plan") and room in ("loops", "worker")}
        assert not wrong, f"{room}/ imports upward: {sorted(wrong)}"


def test_no_vague_names() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_methods_say_where_they_come_from() -> None:
    """Every codec and method has a summary, and its file a text that explains it."""
    for kind in ("codec", "method"):
        for entry in registry.entries(kind):
            assert entry.summary, entry
            text = ast.get_docstring(ast.parse((PACKAGE.parent / Path(*entry.module.split("."))).with_suffix(".py").read_text()))
            assert text and len(text) > 40, entry


def test_recipe_and_report_do_not_bring_torch() -> None:
    modules = ["xutrain", "xutrain.recipe.load", "xutrain.launch.plan", "xutrain.launch.run", "xutrain.cli.app"]
    modules += [f"xutrain.report.{p.stem}" for p in (PACKAGE / "report").glob("*.py") if p.stem != "__init__"]
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
