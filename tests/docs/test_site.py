"""The pages of docs/ as a site: every page is in it, every link leads somewhere, warnings are errors."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", _CODE.sub(lambda m: m[0].strip("`") if "\n" not in m[0] else "", page.read_text()), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = [line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for line in block.splitlines()]
    patterns = [line for line in listed if line and not line.startswith(":")]
    names = [str(p.relative_to(DOCS).with_suffix("")) for p in PAGES if p.name != "index.md"]
    assert not [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)]
    assert not [p for p in patterns if not fnmatch.filter(names, p)]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if missing := [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'xutrain[docs]')")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {str(p.relative_to(tmp_path / "site").with_suffix("")) for p in (tmp_path / "site").rglob("*.html")}
    assert {str(p.relative_to(DOCS).with_suffix("")) for p in PAGES} <= built
