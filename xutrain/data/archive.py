"""Reading chosen files out of a folder, a tar or a zip archive, in one pass and without writing anything. No torch here."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from xutrain.errors import DataError, Issue

#: A file of a set is never larger than this; a larger one is refused before it fills the memory.
LARGEST = 4 << 30
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


def collect(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the files whose base name is wanted, by base name: from a folder (and archives in it), an archive or a file.

    Raises:
        DataError: the path is not there, or an archive is damaged; the message names the file.
    """
    if not path.exists():
        raise DataError(Issue("--source", "no such file or folder", str(path)))
    if path.is_file():
        return _from_archive(path, wanted) if _is_archive(path) else {path.name: _read(path)} if wanted(path.name) else {}
    files = sorted(f for f in path.rglob("*") if f.is_file())
    found = {f.name: _read(f) for f in files if wanted(f.name)}
    if not found:
        for archive in filter(_is_archive, files):
            found |= _from_archive(archive, wanted)
    return found


def damaged(file: str, reason: object) -> DataError:
    """The error for a file that is not what its name says."""
    return DataError(Issue(str(file), f"damaged or not of the expected format: {reason}", has_value=False, hint="get the file again"))


def gunzip(name: str, data: bytes) -> bytes:
    """Decompressed bytes of a .gz file; other data as they are. Raises DataError naming the file when it is truncated."""
    if not name.endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as reason:
        raise damaged(name, reason) from reason


def _is_archive(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".whl"))


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > LARGEST:
            raise damaged(str(file), f"larger than {LARGEST >> 30} GB")
        return file.read_bytes()
    except OSError as reason:
        raise damaged(str(file), reason) from reason


def _from_archive(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        if path.suffix in (".zip", ".whl"):
            with zipfile.ZipFile(path) as archive:
                for item in archive.infolist():
                    name = PurePosixPath(item.filename).name
                    if not item.is_dir() and item.file_size <= LARGEST and wanted(name):
                        found[name] = archive.read(item)
            return found
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and member.size <= LARGEST and wanted(name):
                    handle = archive.extractfile(member)
                    assert handle is not None
                    found[name] = handle.read()
        return found
    except _DAMAGE as reason:
        raise damaged(str(path), reason) from reason
