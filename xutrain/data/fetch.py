"""Getting the files of a set: official archives over HTTP with checksums, or the package that ships the set. No torch here.

Only ``xutrain data prepare`` comes here; training never opens a connection. Every way ends in a folder of files, or raises
``Unavailable`` with a reason, and the next source is tried.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from xutrain.data.store import Source, Url

CONNECT_SECONDS = 10
CLIENT_SECONDS = 900
CHUNK = 1 << 18
#: A server slower than this after ``PATIENCE`` seconds is left for the next source, if there is one.
SLOW_BYTES_PER_SECOND, PATIENCE = 500_000, 20


class Unavailable(Exception):
    """This source cannot deliver here and now; the text says why."""


def fetch(source: Source, folder: Path, say: Callable[[str], None], *, alternatives: bool) -> Path:
    """Bring the files of ``source`` into ``folder`` and return the folder that holds them.

    Files that are already there and have the right checksum are kept; a partial download is continued.

    Raises:
        Unavailable: no network, no such client, a wrong checksum, a server that is too slow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.also:
        for i, part in enumerate([source.model_copy(update={"also": []}), *source.also]):
            fetch(part, folder / str(i), say, alternatives=alternatives)
        return folder
    if source.urls:
        for item in source.urls:
            _download(item, folder / item.url.rsplit("/", 1)[-1], say, alternatives)
        return folder
    if source.npm:
        _client(["npm", "pack", "--silent", source.npm + (f"@{source.version}" if source.version else "")], folder)
        return folder
    if source.debian:
        _client(["apt-get", "download", source.debian], folder)
        packages = sorted(folder.glob("*.deb"))
        if not packages:
            raise Unavailable("apt-get left no package behind")
        _client(["dpkg", "-x", str(packages[-1]), str(folder / "content")], folder)
        return folder / "content"
    binary = "--only-binary" if source.form == "wheel" else "--no-binary"
    wanted = source.pip + (f"=={source.version}" if source.version else "")
    _client([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", binary, ":all:", "-d", ".", wanted], folder)
    return folder


def _client(command: list[str], folder: Path) -> None:
    """Run a package manager's own client in ``folder``."""
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CLIENT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise Unavailable(f"{' '.join(command[:2])}: {reason}") from reason
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{' '.join(command[:2])} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")


def _download(item: Url, target: Path, say: Callable[[str], None], alternatives: bool) -> None:
    if target.exists() and matches(target, item):
        return
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(item.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as answer:
            have = have if answer.status == 206 else 0
            say(f"{item.url}" + (f", continuing at {have / 1e6:.0f} MB" if have else ""))
            length = answer.headers.get("Content-Length", "")
            with part.open("ab" if have else "wb") as out:
                _copy(answer, out, alternatives)
            if length.isdecimal() and part.stat().st_size < have + int(length):
                raise Unavailable(f"{item.url}: the connection ended early; the part that came is kept")
    except urllib.error.HTTPError as reason:
        if reason.code != 416:  # 416: the partial file is already complete
            raise Unavailable(f"{item.url}: {reason}") from reason
    except (OSError, http.client.HTTPException) as reason:
        raise Unavailable(f"{item.url}: {getattr(reason, 'reason', reason)}") from reason
    if not matches(part, item):
        part.unlink()
        raise Unavailable(f"{item.url}: the checksum of what came differs from the official one")
    part.rename(target)


def _copy(answer: http.client.HTTPResponse, out: object, alternatives: bool) -> None:
    began, copied = time.monotonic(), 0
    while chunk := answer.read(CHUNK):
        out.write(chunk)  # type: ignore[attr-defined]
        copied += len(chunk)
        spent = time.monotonic() - began
        if alternatives and spent > PATIENCE and copied < SLOW_BYTES_PER_SECOND * spent:
            raise Unavailable(f"only {copied / spent / 1e3:.0f} kB/s; the part that came is kept")


def matches(file: Path, item: Url) -> bool:
    """Whether the file has the checksums that the manifest gives for it."""
    for kind in ("md5", "sha256"):
        wanted = getattr(item, kind)
        if wanted:
            digest = hashlib.new(kind, usedforsecurity=False)
            with file.open("rb") as handle:
                while chunk := handle.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() != wanted:
                return False
    return True
