"""Environments for peers, one each, that see this environment's torch: ``python benchmarks/peers/make.py [NAME ...]``.

``.bench/NAME`` gets the packages of ``NAME.txt``; whatever it does not hold itself (torch, numpy) is found in the environment
that runs this script, by a .pth file, so that the peer and xutrain compute with the same torch. A line ``# no-deps: A B`` in
NAME.txt installs those packages without what they ask for. An environment that is complete is left as it is. Peers are never
dependencies of xutrain. ``--list`` says which are there. ``python(NAME)`` is for benchmark scripts.

GRACE is on no package registry, so it has no environment here: codecs.py measures our own writing of its TernGrad and QSGD.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = HERE.parent.parent / ".bench"
NAMES = sorted(p.stem for p in HERE.glob("*.txt"))


def python(name: str) -> Path | None:
    """The interpreter of a peer's environment, or None where it has not been made."""
    return HOME / name / "bin" / "python" if (HOME / name / ".ready").exists() else None


def make(name: str) -> None:
    """Make a peer's environment. Raises CalledProcessError where a package does not install."""
    folder, text = HOME / name, (HERE / f"{name}.txt").read_text(encoding="utf-8")
    if (folder / ".ready").exists():
        return
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    inside = str(folder / "bin" / "python")
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([inside, "-c", question], check=True, capture_output=True, text=True).stdout.strip()
    ours = Path(sysconfig.get_path("purelib"))
    (Path(site) / "shared.pth").write_text(f"{ours}\n", encoding="utf-8")  # after the environment's own packages
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    alone = [word for line in re.findall(r"^# no-deps:(.*)$", text, re.M) for word in line.split()]
    wanted = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    bare = [w for w in wanted if re.split(r"[\[<>=!~ ]", w)[0] in alone]
    rest = [w for w in wanted if w not in bare]
    for given, flags in ((bare, ["--no-deps"]), (rest, [])):
        if given:
            subprocess.run([*pip, *flags, *given], check=True)
    (folder / ".ready").write_text(f"{time.perf_counter() - began:.0f} s\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if left out")
    parser.add_argument("--list", action="store_true", help="say which are there, make none")
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if given.list:
        print("\n".join(f"{name:16} {'ready' if python(name) else '-'}" for name in NAMES))
        return 0
    failed = []
    for name in given.names or NAMES:
        try:
            make(name)
            print(f"{name}: {HOME / name}", flush=True)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: not installed, {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
