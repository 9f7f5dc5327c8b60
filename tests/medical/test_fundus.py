"""Fundus sources in their true layouts, tiny: nested discs and cups, drawn contours, label codes, stereo pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_medical as tiny
from PIL import Image, ImageDraw

from xutrain import registry
from xutrain.data.fundus_contours import trace
from xutrain.data.prepare import prepare
from xutrain.data.segmentation import SegmentationTask
from xutrain.errors import DataError

SIDE = 96
CASES = 4


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XUTRAIN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def ellipse(i: int, part: str, side: int = SIDE) -> tuple[float, float, float, float]:
    """Left, top, right, bottom; the cup lies off the middle of the disc."""
    x, y, a, b = side * 0.55 + i, side * 0.45, side * 0.16, side * 0.19
    if part == "cup":
        x, y, a, b = x + 2, y - 1, a / 2, b / 2
    return x - a, y - b, x + a, y + b


def mask(i: int, part: str, side: int = SIDE) -> np.ndarray:
    left, top, right, bottom = ellipse(i, part, side)
    rows, columns = np.mgrid[:side, :side]
    x, y, a, b = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def photograph(i: int, side: int = SIDE) -> np.ndarray:
    """Reddish, the disc lighter and the cup lightest, with some texture."""
    rng = np.random.default_rng(i)
    base = np.array([120, 60, 30]) + 60 * mask(i, "disc", side)[..., None] + 50 * mask(i, "cup", side)[..., None]
    return np.clip(base + rng.integers(-6, 7, base.shape), 0, 255).astype(np.uint8)


def coded(i: int) -> np.ndarray:
    """REFUGE's grey values."""
    return np.where(mask(i, "cup"), 0, np.where(mask(i, "disc"), 128, 255)).astype(np.uint8)


def raw_drishti(root: Path) -> None:
    for i in range(CASES):
        part, truth = ("Training", "GT") if i % 2 else ("Test", "Test_GT")
        name, base = f"drishtiGS_{i:03d}", root / "Drishti-GS1_files" / part
        tiny.picture(base / "Images" / f"{name}.png", photograph(i))
        for key, which in (("ODsegSoftmap", "disc"), ("cupsegSoftmap", "cup")):
            soft = 60 * mask(i + 1, which) + 195 * mask(i, which)  # one of four readers sees it a pixel to the right
            tiny.picture(base / truth / name / "SoftMap" / f"{name}_{key}.png", np.clip(soft, 0, 255).astype(np.uint8))


def raw_rim_one(root: Path) -> None:
    for i in range(CASES):
        group, name = root / ("Healthy" if i % 2 else "Glaucoma and suspects"), f"N-{i // 2}-{'RL'[i % 2]}"
        other = np.zeros((SIDE, SIDE, 3), np.uint8)
        tiny.picture(group / "Stereo Images" / f"{name}.jpg", np.concatenate([photograph(i), other], 1))
        for which, key in (("disc", "Disc"), ("cup", "Cup")):
            both = np.concatenate([mask(i, which), np.zeros((SIDE, SIDE), bool)], 1)
            tiny.picture(group / "Average_masks" / f"{name}-{key}-Avg.png", both.astype(np.uint8) * 255)


def raw_refuge(root: Path) -> None:
    for start, folder, truth in (
        ("g", "Training400/Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Glaucoma"),
        ("n", "Training400/Non-Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma"),
        ("V", "REFUGE-Validation400", "REFUGE-Validation400-GT/Disc_Cup_Masks"),
        ("T", "Test400", "REFUGE-Test-GT/Disc_Cup_Masks/G"),
    ):
        for i in range(CASES):
            tiny.picture(root / folder / f"{start}{i:04d}.jpg", photograph(i + 10 * ord(start)))
            tiny.picture(root / truth / f"{start}{i:04d}.bmp", coded(i))


def drawing(i: int, reader: int) -> np.ndarray:
    """The photograph with a reader's two contours, a little larger or smaller than the truth."""
    picture = Image.fromarray(photograph(i, 3 * SIDE))
    draw = ImageDraw.Draw(picture)
    shift = (reader % 3 - 1) * 1.0
    for part in ("disc", "cup"):
        left, top, right, bottom = ellipse(i, part, 3 * SIDE)
        draw.ellipse((left - shift, top - shift, right + shift, bottom + shift), outline=(0, 255, 0), width=2)
    return np.asarray(picture)


def raw_riga(root: Path) -> None:
    for i in range(CASES):
        folder = root / "BinRushed" / ("BinRushed1-Corrected" if i % 2 else "BinRushed2")
        tiny.picture(folder / f"image{i}prime.jpg", photograph(i, 3 * SIDE))
        for reader in range(1, 7):
            tiny.picture(folder / f"image{i}-{reader}{'.tif' if reader == 6 else '.jpg'}", drawing(i, reader))
        tiny.picture(root / "MESSIDOR" / f"image{i}prime.tif", photograph(i, 3 * SIDE) // 2)
        for reader in range(1, 7):
            drawn = drawing(i, reader)
            halved = np.where(drawn == (0, 255, 0), drawn, drawn // 2).astype(np.uint8)
            tiny.picture(root / "MESSIDOR" / f"image{i}-{reader}.tif", halved)


def raw_origa(root: Path) -> None:
    from scipy.io import savemat

    for i in range(CASES):
        label = mask(i, "disc").astype(np.uint8) + mask(i, "cup")
        tiny.picture(root / "Images" / f"{i:03d}.jpg", photograph(i))
        (root / "Semi-automatic-annotations").mkdir(exist_ok=True)
        if i % 2:
            savemat(root / "Semi-automatic-annotations" / f"{i:03d}.mat", {"mask": label})
        else:
            tiny.picture(root / "Masks" / f"{i:03d}.png", label)


def raw_dofe(root: Path) -> None:
    for domain in (1, 4):
        for i in range(CASES):
            base = root / "Fundus" / f"Domain{domain}" / ("train" if i else "test") / "ROIs"
            tiny.picture(base / "image" / f"V{i:04d}.png", photograph(i + 10 * domain))
            tiny.picture(base / "mask" / f"V{i:04d}.png", coded(i))


RAW: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "fundus_drishti": (raw_drishti, [""]),
    "fundus_rim_one": (raw_rim_one, [""]),
    "fundus_refuge": (raw_refuge, ["train", "validation", "test"]),
    "fundus_riga": (raw_riga, ["binrushed", "messidor"]),
    "fundus_origa": (raw_origa, [""]),
    "fundus_dofe": (raw_dofe, ["domain1", "domain4"]),
}


def build(name: str, sites: list[str]) -> SegmentationTask:
    cls = registry.load("dataset", "medical_datalists")
    lists = {site or "all": f"{name}/{site}".rstrip("/") for site in sites}
    return cls.build(cls.Options(lists=lists, channels=3, size=[64, 64], structures={"disc": [1, 2], "cup": [2]}), 0)


@pytest.mark.parametrize("name", RAW)
def test_source(name: str, tmp_path: Path, data_folder: Path) -> None:
    """Disc and cup have the sizes that were drawn, the light one is the cup, and a run can read every site."""
    write, sites = RAW[name]
    write(tmp_path / "raw")
    notes = prepare(name, tmp_path / "raw")["notes"]
    assert "WARNING: the complete set has" in notes[-1]
    scale = 3 if name == "fundus_riga" else 1
    for site in sites:
        listed = json.loads((data_folder / name / site / "datalist.json").read_text())
        for item in (item for items in listed.values() for item in items):
            label = np.asarray(Image.open(data_folder / name / site / item["label"]))
            colour = np.asarray(Image.open(data_folder / name / site / item["image"]).convert("RGB")).astype(int)
            assert label.shape == colour.shape[:2] and set(np.unique(label)) == {0, 1, 2}
            for least, part in ((1, "disc"), (2, "cup")):
                truth = int(mask(0, part, scale * SIDE).sum())
                assert abs(int((label >= least).sum()) - truth) < 0.06 * truth + 3
            red = colour[..., 0]
            if site != "messidor" and name not in ("fundus_refuge", "fundus_dofe"):  # there image and mask are of different eyes
                assert red[label == 2].mean() > red[label == 1].mean() + 30 > red[label == 0].mean() + 60
            assert name == "fundus_dofe" or label.shape[0] == label.shape[1] <= round(3.1 * 0.4 * scale * SIDE)
    task = build(name, sites)
    assert task.input_shape == (3, 64, 64) and task.structures == ("disc", "cup")
    assert bool((task.scans.masks[:, 0] >= task.scans.masks[:, 1]).all())


def test_both_eyes_stay_together(tmp_path: Path, data_folder: Path) -> None:
    raw_rim_one(tmp_path / "raw")
    prepare("fundus_rim_one", tmp_path / "raw")
    listed = json.loads((data_folder / "fundus_rim_one/datalist.json").read_text())
    people = [{item["case"] for item in items} for items in listed.values()]
    assert not set.intersection(people[0], people[2]) and sum(len(items) for items in listed.values()) == 4


def test_contours_against_the_true_ellipse() -> None:
    """Dice above .95 for disc and cup, of one drawing, also after JPEG."""
    import io

    for i in range(3):
        for compressed in (False, True):
            drawn = drawing(i, 2)
            if compressed:
                buffer = io.BytesIO()
                Image.fromarray(drawn).save(buffer, "JPEG", quality=90)
                drawn = np.asarray(Image.open(buffer))
            found = trace(photograph(i, 3 * SIDE), drawn)
            assert found is not None
            for made, part in zip(found, ("disc", "cup"), strict=True):
                left, top, right, bottom = (round(v) for v in ellipse(i, part, 3 * SIDE))
                rows, columns = np.mgrid[: 3 * SIDE, : 3 * SIDE]
                x, y = (left + right) / 2, (top + bottom) / 2
                truth = ((columns - x) / ((right - left) / 2)) ** 2 + ((rows - y) / ((bottom - top) / 2)) ** 2 <= 1
                assert 2 * (made & truth).sum() / (made.sum() + truth.sum()) > 0.95


def test_contours_that_are_none() -> None:
    plain = photograph(0)
    assert trace(plain, plain) is None
    scribbled = plain.copy()
    scribbled[20:22, 10:60] = (0, 255, 0)
    assert trace(plain, scribbled) is None


@pytest.mark.parametrize("name", RAW)
def test_nothing_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="a site without data"):
        prepare(name, tmp_path / "raw")


def test_faults_name_the_file(tmp_path: Path) -> None:
    raw_refuge(tmp_path / "raw")
    truth = tmp_path / "raw/REFUGE-Validation400-GT/Disc_Cup_Masks"
    tiny.picture(truth / "V0000.bmp", np.full((SIDE, SIDE), 255, np.uint8))
    tiny.picture(truth / "V0001.bmp", coded(0)[:50])
    (tmp_path / "raw/REFUGE-Validation400/V0002.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(DataError) as caught:
        prepare("fundus_refuge", tmp_path / "raw")
    lines = [issue.lines()[0] for issue in caught.value.issues]
    assert len(lines) == 3 and all("(site validation)" in line for line in lines)
    for line, name, what in zip(
        lines, ("V0000.jpg", "V0001.jpg", "V0002.jpg"), ("empty mask", "mask of shape", "cannot be read"), strict=True
    ):
        assert name in line and what in line


def test_missing_masks_and_images_are_named(tmp_path: Path) -> None:
    raw_rim_one(tmp_path / "raw")
    (tmp_path / "raw/Healthy/Average_masks/N-0-L-Cup-Avg.png").unlink()
    with pytest.raises(DataError, match=r"no Cup mask N-0-L-Cup-Avg\.png"):
        prepare("fundus_rim_one", tmp_path / "raw")
    raw_riga(tmp_path / "riga")
    for file in (tmp_path / "riga/MESSIDOR").glob("image1-*.tif"):
        file.unlink()
    with pytest.raises(DataError, match=r"image1prime\.tif \(site messidor\): cannot be read: no image with contours"):
        prepare("fundus_riga", tmp_path / "riga")


def test_contours_that_cannot_be_traced_are_noted(tmp_path: Path) -> None:
    raw_riga(tmp_path / "riga")
    folder = tmp_path / "riga/MESSIDOR"
    tiny.picture(folder / "image0-1.tif", np.asarray(Image.open(folder / "image0prime.tif")))
    assert any("contours of 1 of 6 readers" in note for note in prepare("fundus_riga", tmp_path / "riga")["notes"])
    for reader in range(2, 5):
        tiny.picture(folder / f"image0-{reader}.tif", np.asarray(Image.open(folder / "image0prime.tif")))
    notes = prepare("fundus_riga", tmp_path / "riga", root=tmp_path / "other")["notes"]
    assert "image0 is left out: contours could be traced in 2 of 6 drawings" in notes and any("messidor: 3 cases" in note for note in notes)
    for file in folder.glob("image*-?.tif"):
        tiny.picture(file, np.asarray(Image.open(folder / f"{file.stem[:-2]}prime.tif")))
    with pytest.raises(DataError, match=r"\(site messidor\): a site without data"):
        prepare("fundus_riga", tmp_path / "riga", root=tmp_path / "third")
