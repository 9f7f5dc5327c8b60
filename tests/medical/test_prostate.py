"""Prostate sources in their true formats, tiny: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny_medical as tiny

from xutrain import registry
from xutrain.data.prepare import prepare, verify
from xutrain.errors import DataError

SHAPE = (16, 18, 5)  # x, y, z; no two alike, and the gland below is off centre, so that a wrong axis or flip is seen
CASES = 4


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XUTRAIN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def gland(i: int) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    return (np.abs(x - 5) < 3) & (np.abs(y - 11 - i % 2) < 4) & (z > 0) & (z < 4 - i % 2)


def image(i: int) -> np.ndarray:
    """Bright where the gland is, so that a mask in the wrong place is seen."""
    rng = np.random.default_rng(i)
    return (100 + 800 * gland(i) + rng.integers(0, 50, SHAPE)).astype(np.uint16)


def raw_i2cvb(root: Path) -> None:
    for i in range(CASES):
        case = root / ("GE" if i % 2 else "Siemens") / f"Patient {i}"
        tiny.dicom_series(case / "T2W", image(i), names="MR {:03d}")
        tiny.dicom_series(case / "GT" / "prostate", gland(i) * 255, descending=bool(i % 2))
    tiny.dicom_series(root / "GE" / "Patient_428260" / "T2W", image(9))


def raw_msd(root: Path) -> None:
    affine = np.diag([-0.5, -0.5, 3, 1.0])
    for i in range(CASES):
        both = np.stack([image(i), 7 * np.ones(SHAPE)], -1).astype(np.float32)
        tiny.nifti(root / "Task05_Prostate/imagesTr" / f"prostate_{i:02d}.nii.gz", both, affine)
        zones = gland(i) * (1 + (np.arange(SHAPE[0]) > 4))[:, None, None]
        tiny.nifti(root / "Task05_Prostate/labelsTr" / f"prostate_{i:02d}.nii.gz", zones.astype(np.uint8), affine)
    (root / "Task05_Prostate/imagesTr/._prostate_00.nii.gz").write_bytes(b"junk")
    tiny.nifti(root / "Task05_Prostate/imagesTs/prostate_90.nii.gz", image(0).astype(np.float32), affine)


def raw_nci(root: Path, collection: str, prefix: str) -> None:
    for i in range(CASES):
        case = f"{prefix}-01-{i + 4:04d}"
        tiny.dicom_series(root / "manifest-1" / collection / case / "study 1" / "series", image(i))
        ending = {0: "_truth", 2: "_correctedLabels"}.get(i, "")
        tiny.itk(root / "Mask" / ("Training" if i else "Test") / f"{case}{ending}.nrrd", (gland(i) * (1 + i % 2)).astype(np.uint8))


def raw_nci_3t(root: Path) -> None:
    raw_nci(root, "Prostate-3T", "Prostate3T")


def raw_nci_dx(root: Path) -> None:
    raw_nci(root, "PROSTATE-DIAGNOSIS", "ProstateDx")
    tiny.dicom_series(root / "manifest-1/PROSTATE-DIAGNOSIS/ProstateDx-01-0055/s/s", image(9))
    tiny.itk(root / "Mask/Training/ProstateDx-01-0055.nrrd", np.zeros((4, 4, 4), np.uint8))


def raw_promise12(root: Path) -> None:
    for i in range(CASES):
        tiny.itk(root / f"Part{i % 2}" / f"Case{i:02d}.mhd", image(i).astype(np.int16))
        tiny.itk(root / f"Part{i % 2}" / f"Case{i:02d}_segmentation.mhd", gland(i).astype(np.int8))


def raw_prostatex(root: Path) -> None:
    for i in range(CASES):
        case = f"ProstateX-{i:04d}"
        base = root / "Image/manifest/PROSTATEx" / case / "study"
        tiny.dicom_series(base / "t2", image(i), uid="1.2.3.4", descending=bool(i % 2))
        tiny.dicom_series(base / "t1", image(i) // 2, uid="1.2.3.9")
        inner = gland(i) & (np.arange(SHAPE[0]) > 4)[:, None, None]
        urethra = np.zeros(SHAPE, bool)
        urethra[12, 12, :] = True  # on every slice, but counts only where the gland is
        zones = {1: gland(i) & ~inner, 2: inner, 3: urethra, 4: inner}
        file = root / "Mask/manifest/PROSTATEx" / case / "study" / "seg" / "1-1.dcm"
        tiny.dicom_segmentation(file, zones, flip_rows=bool(i % 2))


RAW = {
    "prostate_i2cvb": raw_i2cvb,
    "prostate_msd": raw_msd,
    "prostate_nci_3t": raw_nci_3t,
    "prostate_nci_dx": raw_nci_dx,
    "prostate_promise12": raw_promise12,
    "prostate_prostatex": raw_prostatex,
}


@pytest.mark.parametrize("name", RAW)
def test_source(name: str, tmp_path: Path, data_folder: Path) -> None:
    """Every case is written, the mask lies on the gland, the split is NVFlare's, and a run can read it."""
    RAW[name](tmp_path / "raw")
    result = prepare(name, tmp_path / "raw")
    assert result["status"] == "ready" and "WARNING: the complete set has" in " ".join(result["notes"])
    assert verify(name)["status"] == "ok" and prepare(name)["status"] == "was ready"
    folder = data_folder / name
    listed = json.loads((folder / "datalist.json").read_text())
    assert {key: len(items) for key, items in listed.items()} == {"training": 2, "validation": 1, "testing": 1}
    sizes = []
    for item in (item for items in listed.values() for item in items):
        scan, mask = nibabel.load(folder / item["image"]), nibabel.load(folder / item["label"])
        voxels, inside = np.asarray(scan.dataobj), np.asarray(mask.dataobj)
        assert np.array_equal(scan.affine, mask.affine) and set(np.unique(inside)) == {0, 1}
        extra = 0
        if name == "prostate_prostatex":  # the urethra: one voxel on each slice of the gland
            extra = int((inside.astype(bool) & (voxels < 800)).sum())
            assert extra == inside.any((0, 1)).sum()
        assert inside.sum() - extra == (voxels >= 800).sum() and (voxels[(inside > 0)] >= 800).sum() == inside.sum() - extra
        assert sorted(voxels.shape) == sorted(SHAPE) and 3.0 in np.round(nibabel.affines.voxel_sizes(scan.affine), 3)
        sizes.append(int(inside.sum()) - extra)
    assert sorted(sizes) == sorted(int(gland(i).sum()) for i in range(CASES))
    cls = registry.load("dataset", "medical_datalists")
    task = cls.build(cls.Options(lists={"site": name}, window=[0.0, 2048.0], size=[16, 16]), 0)
    assert task.num_train == sum(int(gland(i).any((0, 1)).sum()) for i in range(CASES)) - len(task.split_cases("test"))


def test_same_picture_from_every_source(tmp_path: Path, data_folder: Path) -> None:
    """Whatever the format and its axes, the same patient gives the same samples (the tiny affines say the same place)."""
    seen = []
    for name in ("prostate_i2cvb", "prostate_nci_3t", "prostate_promise12", "prostate_prostatex"):
        RAW[name](tmp_path / name)
        prepare(name, tmp_path / name)
        listed = json.loads((data_folder / name / "datalist.json").read_text())
        (data_folder / name / "datalist.json").write_text(
            json.dumps({"training": sorted((i for items in listed.values() for i in items), key=lambda i: i["image"])})
        )
        cls = registry.load("dataset", "medical_datalists")
        task = cls.build(cls.Options(lists={"site": name}, window=[0.0, 2048.0], dims=3, size=None), 0)
        seen.append(task.scans.images[task.scans.cases.index(sorted(task.scans.cases)[0])])
    assert all((seen[0] == other).all() for other in seen[1:])


def test_saml(tmp_path: Path, data_folder: Path) -> None:
    for site, ending in (("BMC", "_Segmentation"), ("HK", "_segmentation")):
        for i in range(CASES):
            tiny.nifti(tmp_path / "raw" / site / f"Case{i:02d}.nii.gz", image(i).astype(np.float32))
            tiny.nifti(tmp_path / "raw" / site / f"Case{i:02d}{ending}.nii.gz", (2 * gland(i)).astype(np.uint8))
    notes = prepare("prostate_saml", tmp_path / "raw")["notes"]
    assert len(notes) == 2 and notes[0].startswith("BMC: 4 cases") and "WARNING" in notes[0]
    cls = registry.load("dataset", "medical_datalists")
    lists = {"BMC": "prostate_saml/BMC", "HK": "prostate_saml/HK"}
    with pytest.raises(DataError, match=r"\(test of site HK\): the same image|the same image as"):
        cls.build(cls.Options(lists=lists, window=None, size=[16, 16]), 0)  # this test gave both sites the same patients
    task = cls.build(cls.Options(lists={"BMC": "prostate_saml/BMC"}, window=None, size=[16, 16]), 0)
    assert task.input_shape == (1, 16, 16)


@pytest.mark.parametrize("name", [*RAW, "prostate_saml"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="a site without data") as caught:
        prepare(name, tmp_path / "raw")
    assert len(caught.value.issues) == 1 and not (tmp_path / "data" / name).exists()


def test_all_missing_masks_are_named(tmp_path: Path) -> None:
    raw_msd(tmp_path / "raw")
    for i in (0, 2):
        (tmp_path / "raw/Task05_Prostate/labelsTr" / f"prostate_{i:02d}.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        prepare("prostate_msd", tmp_path / "raw")
    assert [issue.lines()[0].count("(site prostate_msd): no such mask") for issue in caught.value.issues] == [1, 1]


def test_wrong_cases_are_named(tmp_path: Path, data_folder: Path) -> None:
    raw_promise12(tmp_path / "raw")
    tiny.itk(tmp_path / "raw/Part0/Case00_segmentation.mhd", np.ones((4, 4, 4), np.int8))
    tiny.itk(tmp_path / "raw/Part1/Case01_segmentation.mhd", np.zeros(SHAPE, np.int8))
    (tmp_path / "raw/Part0/Case02.raw").write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        prepare("prostate_promise12", tmp_path / "raw")
    lines = [issue.lines()[0] for issue in caught.value.issues]
    assert len(lines) == 3 and all("(site prostate_promise12)" in line for line in lines)
    assert "Case00.mhd" in lines[0] and "mask of shape (4, 4, 4)" in lines[0]
    assert "Case02.mhd" in lines[1 if "Case02" in lines[1] else 2] and "Case01.mhd" in " ".join(lines) and "empty mask" in " ".join(lines)
    assert not (data_folder / "prostate_promise12").exists()


def test_damaged_nifti(tmp_path: Path) -> None:
    raw_msd(tmp_path / "raw")
    (tmp_path / "raw/Task05_Prostate/imagesTr/prostate_01.nii.gz").write_bytes(b"nothing")
    file = tmp_path / "raw/Task05_Prostate/labelsTr/prostate_02.nii.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError) as caught:
        prepare("prostate_msd", tmp_path / "raw")
    lines = [issue.lines()[0] for issue in caught.value.issues]
    assert len(lines) == 2 and all("(site prostate_msd): cannot be read" in line for line in lines)
    assert "prostate_01.nii.gz" in lines[0] and "prostate_02.nii.gz" in lines[1]


def test_raw_file_missing(tmp_path: Path) -> None:
    raw_promise12(tmp_path / "raw")
    (tmp_path / "raw/Part0/Case00_segmentation.raw").unlink()
    with pytest.raises(DataError, match=r"Case00_segmentation\.raw"):
        prepare("prostate_promise12", tmp_path / "raw")


def test_damaged_dicom(tmp_path: Path) -> None:
    raw_nci_3t(tmp_path / "raw")
    series = tmp_path / "raw/manifest-1/Prostate-3T/Prostate3T-01-0005/study 1/series"
    for file in series.iterdir():
        file.write_bytes(b"not dicom")
    with pytest.raises(DataError, match=r"Prostate3T-01-0005\.nrrd \(site prostate_nci_3t\): cannot be read"):
        prepare("prostate_nci_3t", tmp_path / "raw")


def test_segmentation_outside_its_image(tmp_path: Path) -> None:
    raw_prostatex(tmp_path / "raw")
    file = tmp_path / "raw/Mask/manifest/PROSTATEx/ProstateX-0000/study/seg/1-1.dcm"
    far = np.zeros((*SHAPE[:2], 40), bool)
    far[4, 4, 30] = True
    tiny.dicom_segmentation(file, {1: far})
    with pytest.raises(DataError, match="lies outside the image"):
        prepare("prostate_prostatex", tmp_path / "raw")
