"""The user's own data: what is read, in which form, and what is refused with a line that names file and site."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny_medical as tiny
import torch

from xutrain import registry
from xutrain.data.medical_lists import read_list, share
from xutrain.data.segmentation import SegmentationTask
from xutrain.engine.rng import Key
from xutrain.errors import DataError, XutrainError


def build(root: Path, **options: object) -> SegmentationTask:
    cls = registry.load("dataset", "medical_datalists")
    chosen = {"lists": {"A": "A", "B": "B"}, "root": "", "size": [16, 16], "window": [0.0, 200.0], **options}
    chosen["lists"] = {k: str(root / str(v)) for k, v in dict(chosen["lists"]).items()}  # type: ignore[call-overload]
    if "unseen" in chosen:
        chosen["unseen"] = {k: str(root / str(v)) for k, v in dict(chosen["unseen"]).items()}  # type: ignore[call-overload]
    return cls.build(cls.Options(**chosen), 0)


def faults(root: Path, **options: object) -> list[str]:
    with pytest.raises(XutrainError) as caught:
        build(root, **options)
    assert caught.value.exit_code in (2, 3)
    return [issue.lines()[0] for issue in caught.value.issues]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    tiny.site(tmp_path, "A")
    tiny.site(tmp_path, "B", gain=60)
    return tmp_path


def test_share_is_nvflares_rule() -> None:
    counts = {32: (16, 8, 8), 39: (20, 10, 9), 40: (20, 10, 10), 50: (25, 12, 13), 98: (49, 24, 25)}
    for n, expected in counts.items():
        dealt = share([f"case{i:02d}" for i in range(n)])
        assert tuple(len(dealt[s]) for s in ("training", "validation", "testing")) == expected
    np.random.seed(0)
    order = np.arange(8)
    np.random.shuffle(order)
    assert share(list("hgfedcba"))["training"] == ["abcdefgh"[i] for i in order[:4]]


def test_slices(two: Path) -> None:
    task = build(two)
    assert task.input_shape == (1, 16, 16) and task.site_names == ("A", "B") and not task.synthetic
    assert task.held_out is not None and set(task.split_cases("test")) == {"A/case3", "B/case3"}
    assert bool((task.scans.masks.flatten(1).sum(1) > 0).all()), "slices without a structure are left out"
    inside, outside = task.scans.images[task.scans.masks > 0], task.scans.images[task.scans.masks == 0]
    assert inside.mean() > outside.mean() + 0.2 and task.scans.images.min() >= 0 and task.scans.images.max() <= 1


def test_volumes_and_patches(two: Path) -> None:
    task = build(two, dims=3, size=[4, 16, 16])
    assert task.input_shape == (1, 4, 16, 16) and task.num_train == 6
    patched = build(two, dims=3, size=[4, 16, 16], patch=[4, 8, 8], spacing=[1.0, 2.0, 2.0], fit="pad")
    for each in (task, patched, build(two)):
        batch = each.batch(torch.arange(2), Key(0))
        assert type(each.scans.images) is type(each.scans.masks) is type(batch.inputs) is type(batch.targets) is torch.Tensor
    assert patched.input_shape == (1, 4, 8, 8) and patched.scans.images.shape[2:] == (4, 16, 16)


def test_a_dicom_series_out_of_order_is_refused(tmp_path: Path) -> None:
    """The reader stacks slices by instance number: where these lie in another order in space, or one is missing, nothing is guessed."""
    import pydicom

    mask = tiny.ellipsoid((9, 11, 5))
    items = [{"image": f"i{n}", "label": f"m{n}"} for n in range(3)]
    for n in range(3):
        tiny.dicom_series(tmp_path / "S" / f"i{n}", mask * 300 + 20 + n, descending=True)
        tiny.dicom_series(tmp_path / "S" / f"m{n}", mask * 1, descending=True)
    (tmp_path / "S" / "datalist.json").write_text(json.dumps({"training": items[:2], "testing": items[2:]}))
    task = build(tmp_path, lists={"S": "S"}, dims=3, size=None, window=[0.0, 400.0])
    assert torch.equal(task.scans.masks[0, 0], torch.from_numpy(mask.transpose(2, 1, 0).astype(np.uint8)))
    files = sorted((tmp_path / "S" / "m1").iterdir())
    for file, number in zip(files, (1, 3, 2, 4, 5), strict=True):
        head = pydicom.dcmread(file)
        head.InstanceNumber = number
        pydicom.dcmwrite(file, head)
    for place in ("i0", "m0"):
        sorted((tmp_path / "S" / place).iterdir())[2].unlink()
    found = faults(tmp_path, lists={"S": "S"}, dims=3, size=None)
    assert "S/i0" in found[0] and "a slice of the series is missing" in found[0]
    assert "S/m1" in found[1] and "do not follow the slices' positions" in found[1]


def test_orientation_does_not_matter(two: Path) -> None:
    """The same anatomy stored in another orientation gives the same samples."""
    plain = build(two, dims=3, size=None)
    for kind in ("Image", "Mask"):
        for file in (two / "A" / kind).iterdir():
            image = nibabel.load(file)
            data = np.asarray(image.dataobj)[:, ::-1, :].transpose(2, 0, 1)
            affine = np.array([[0, 1, 0, 0], [0, 0, -1, image.shape[1] - 1], [1, 0, 0, 0], [0, 0, 0, 1.0]])
            tiny.nifti(file, np.ascontiguousarray(data), affine)
    turned = build(two, dims=3, size=None)
    assert torch.equal(plain.scans.images, turned.scans.images) and torch.equal(plain.scans.masks, turned.scans.masks)


def test_spacings_of_samples(tmp_path: Path) -> None:
    """Millimetres between pixels as they are in the samples: turned, resampled, brought to size; of pictures they are not known."""
    items = []
    for n in range(3):
        mask = tiny.ellipsoid((12, 9, 5), 0.5, 0.3)
        affine = np.array([[0, 0, 3.0, 0], [0.5, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]])  # x of the file goes along y of the person
        tiny.nifti(tmp_path / "V" / f"i{n}.nii.gz", (mask * 90 + n).astype(np.float32), affine)
        tiny.nifti(tmp_path / "V" / f"m{n}.nii.gz", mask.astype(np.uint8), affine)
        tiny.picture(tmp_path / "P" / f"i{n}.png", np.full((16, 16), n, np.uint8))
        tiny.picture(tmp_path / "P" / f"m{n}.png", tiny.ellipsoid((16, 16)).astype(np.uint8))
        items.append((f"i{n}", f"m{n}"))
    for site, end in (("V", "nii.gz"), ("P", "png")):
        rows = [{"image": f"{i}.{end}", "label": f"{m}.{end}"} for i, m in items]
        (tmp_path / site / "datalist.json").write_text(json.dumps({"training": rows[:2], "testing": rows[2:]}))
    whole = build(tmp_path, lists={"V": "V"}, dims=3, size=None)
    assert whole.input_shape == (1, 9, 12, 5) and whole.split_spacings("test").tolist() == [pytest.approx([1.5, 0.5, 3.0])]
    sized = build(tmp_path, lists={"V": "V"}, dims=3, size=[17, 12, 9])
    assert sized.split_spacings("test")[0].tolist() == pytest.approx([0.75, 0.5, 1.5])
    padded = build(tmp_path, lists={"V": "V"}, size=[24, 24], fit="pad", spacing=[1.5, 1.0, 1.0])
    assert padded.split_spacings("train")[0].tolist() == pytest.approx([1.0, 1.0])
    mixed = build(tmp_path, lists={"V": "V", "P": "P"}, size=[16, 16])
    known = mixed.split_spacings("test").isfinite().all(1)
    assert known.tolist() == [mixed.site_names[s] == "V" for s in mixed.split_sites("test")]


def test_aligned_corners(two: Path) -> None:
    """The resize is linear interpolation with aligned corners, masks are cut at 0.5 after it."""
    from torch.nn.functional import interpolate

    small, large = build(two, dims=3, size=None), build(two, dims=3, size=[4, 24, 24])
    wanted = interpolate(small.scans.images, (4, 24, 24), mode="trilinear", align_corners=True)
    assert torch.allclose(large.scans.images, wanted, atol=1e-6)
    masks = interpolate(small.scans.masks.float(), (4, 24, 24), mode="trilinear", align_corners=True) >= 0.5
    assert (masks.to(torch.uint8) != large.scans.masks).float().mean() < 1e-3


def test_pictures_with_two_structures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for code, values in (("labels", (2, 1, 0)), ("refuge", (0, 128, 255))):
        items = []
        for i in range(4):
            disc, cup = tiny.ellipsoid((20, 24), 0.5, 0.3), tiny.ellipsoid((20, 24), 0.5, 0.15)
            mask = np.where(cup, values[0], np.where(disc, values[1], values[2])).astype(np.uint8)
            tiny.picture(tmp_path / code / f"e{i}.png", rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
            tiny.picture(tmp_path / code / f"m{i}.bmp", mask)
            items.append({"image": f"e{i}.png", "label": f"m{i}.bmp"})
        (tmp_path / code / "datalist.json").write_text(json.dumps({"training": items}))
        structures = {"disc": [1, 2], "cup": [2]}
        task = build(tmp_path, lists={"eye": code}, channels=3, size=None, structures=structures, mask_code=code)
        assert task.input_shape == (3, 20, 24) and task.structures == ("disc", "cup") and task.num_train == 3
        assert torch.equal(task.scans.masks[0, 0], torch.from_numpy(disc.astype(np.uint8)))
        assert torch.equal(task.scans.masks[0, 1], torch.from_numpy(cup.astype(np.uint8)))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_not_cut_at_eight(tmp_path: Path, ending: str) -> None:
    """Pillow's conversion to grey would make all of these white."""
    items, mask = [], tiny.ellipsoid((18, 14))
    for i in range(4):
        tiny.picture(tmp_path / "S" / f"x{i}.{ending}", (mask * 40_000 + 1000 * (i + 1)).astype(np.uint16))
        tiny.picture(tmp_path / "S" / f"m{i}.png", mask.astype(np.uint8))
        items.append({"image": f"x{i}.{ending}", "label": f"m{i}.png"})
    (tmp_path / "S" / "datalist.json").write_text(json.dumps({"training": items[:3], "testing": items[3:]}))
    task = build(tmp_path, lists={"S": "S"}, size=None, window=[0.0, 50_000.0])
    assert [round(float(v), 4) for v in task.scans.images.amin((1, 2, 3))] == [0.02, 0.04, 0.06]
    assert [round(float(v), 4) for v in task.scans.images.amax((1, 2, 3))] == [0.82, 0.84, 0.86]
    assert "1 channels" in faults(tmp_path, lists={"S": "S"}, channels=3)[0], "grey of 16 bits is not made colour"


def test_numbers_as_names_are_cases_unless_they_are_slices(tmp_path: Path) -> None:
    """Image/003.png with Mask/003.png is a case of its own; Image/p1/003.png with Mask/p1/003.png is a slice of p1."""
    for site, place in (("flat", "{part}/{n:03d}.png"), ("slices", "{part}/p{n}/7.png")):
        items = []
        for n in range(4):
            files = {part: place.format(part=part, n=n) for part in ("Image", "Mask")}
            tiny.picture(tmp_path / site / files["Image"], np.full((16, 16), 10 * n + (site == "flat"), np.uint8))
            tiny.picture(tmp_path / site / files["Mask"], tiny.ellipsoid((16, 16)).astype(np.uint8))
            items.append({"image": files["Image"], "label": files["Mask"]})
        (tmp_path / site / "datalist.json").write_text(json.dumps({"training": items[:3], "testing": items[3:]}))
    task = build(tmp_path, lists={"flat": "flat", "slices": "slices"})
    assert list(task.splits["train"].cases) == ["flat/000", "flat/001", "flat/002", "slices/p0", "slices/p1", "slices/p2"]


@pytest.mark.parametrize("value", [5, [5], [], {"a": "b"}, ["a.png", None]])
def test_items_that_name_no_file(two: Path, value: object) -> None:
    file = two / "A" / "datalist.json"
    listed = json.loads(file.read_text())
    listed["training"][1]["image"] = value
    file.write_text(json.dumps(listed))
    assert "A/datalist.json" in faults(two)[0]


def test_one_mask_file_a_structure(tmp_path: Path) -> None:
    disc, cup = (tiny.ellipsoid((16, 16), 0.5, r) for r in (0.3, 0.1))
    for i in range(4):
        tiny.picture(tmp_path / "S" / f"i{i}.png", np.full((16, 16), 10 * i, np.uint8))
    for name, mask in (("d", disc), ("c", cup)):
        tiny.picture(tmp_path / "S" / f"{name}.png", mask.astype(np.uint8) * 255)
    items = [{"image": f"i{i}.png", "label": ["d.png", "c.png"]} for i in range(4)]
    (tmp_path / "S" / "datalist.json").write_text(json.dumps({"training": items}))
    task = build(tmp_path, lists={"S": "S"}, structures={"disc": [], "cup": []}, mask_code="files")
    assert task.scans.masks[0].sum((1, 2)).tolist() == [int(disc.sum()), int(cup.sum())]


def test_decathlon_form(tmp_path: Path) -> None:
    """The MSD's own dataset.json: 4-D images, labels 1 and 2, test images without labels, no validation part."""
    tiny.site(tmp_path, "msd", cases=8)
    for i in range(8):
        image = np.asarray(nibabel.load(tmp_path / "msd/Image" / f"case{i}.nii.gz").dataobj)
        tiny.nifti(tmp_path / "msd/imagesTr" / f"p_{i:02d}.nii.gz", np.stack([image, image * 2], -1))
        mask = np.asarray(nibabel.load(tmp_path / "msd/Mask" / f"case{i}.nii.gz").dataobj)
        tiny.nifti(tmp_path / "msd/labelsTr" / f"p_{i:02d}.nii.gz", (mask * (1 + i % 2)).astype(np.uint8))
    training = [{"image": f"./imagesTr/p_{i:02d}.nii.gz", "label": f"./labelsTr/p_{i:02d}.nii.gz"} for i in range(8)]
    (tmp_path / "msd/dataset.json").write_text(
        json.dumps({"name": "x", "labels": {"0": "background"}, "numTraining": 8, "training": training, "test": ["./imagesTs/p_09.nii.gz"]})
    )
    items = read_list("msd", tmp_path / "msd/dataset.json")
    assert [sum(i.split == s for i in items) for s in ("train", "val", "test")] == [4, 2, 2]
    task = build(tmp_path, lists={"msd": "msd/dataset.json"}, channels=2, dims=3, size=None, structures={"whole": [1, 2]})
    assert task.input_shape == (2, 4, 16, 16) and task.num_train == 6


def test_folds_and_limit(two: Path) -> None:
    listed = json.loads((two / "A/datalist.json").read_text())
    every = [{**item, "fold": i} for i, item in enumerate(listed["training"] + listed["validation"])]
    for name in ("A", "B"):
        (two / name / "datalist.json").write_text(json.dumps({"training": every, "testing": listed["testing"]}))
    task = build(two, fold=1, dims=3, size=None)
    assert task.held_out is not None and [task.scans.cases[i] for i in task.held_out.nonzero().flatten()] == ["A/case1", "B/case1"]
    assert build(two, dims=3, size=None).held_out is None
    assert build(two, dims=3, size=None, limit=1).num_train == 2
    assert "no training item of that fold" in faults(two, fold=7)[0]


def test_unseen_site(two: Path) -> None:
    tiny.site(two, "C", gain=30)
    task = build(two, unseen={"C": "C"}, dims=3, size=None)
    assert task.unseen_sites == (2,) and task.split_cases("test") == ["A/case3", "B/case3", "C/case3"]
    listed = json.loads((two / "C/datalist.json").read_text())
    (two / "C/datalist.json").write_text(json.dumps({"training": listed["training"]}))
    assert build(two, unseen={"C": "C"}, dims=3, size=None).split_cases("test")[2:] == ["C/case0", "C/case1"]


def test_all_missing_files_at_once(two: Path) -> None:
    (two / "A/Image/case0.nii.gz").unlink()
    (two / "B/Mask/case3.nii.gz").unlink()
    lines = faults(two)
    assert len(lines) == 2
    assert "A/Image/case0.nii.gz (site A): no such image" in lines[0] and "B/Mask/case3.nii.gz (site B): no such mask" in lines[1]


def test_every_wrong_file_is_named_with_its_site(two: Path) -> None:
    tiny.nifti(two / "A/Mask/case0.nii.gz", np.ones((16, 12, 4), np.uint8))
    tiny.nifti(two / "A/Mask/case1.nii.gz", np.zeros((16, 16, 4), np.uint8))
    whole = (two / "B/Image/case0.nii.gz").read_bytes()
    (two / "B/Image/case0.nii.gz").write_bytes(whole[: len(whole) // 2])
    tiny.nifti(two / "B/Mask/case1.nii.gz", (tiny.ellipsoid((16, 16, 4)) * 7).astype(np.uint8))
    tiny.nifti(two / "B/Mask/case2.nii.gz", tiny.ellipsoid((16, 16, 4)).astype(np.uint8), np.diag([1, 1, 3, 1.0]))
    image = np.full((16, 16, 4), np.nan, np.float32)
    tiny.nifti(two / "B/Image/case3.nii.gz", image)
    lines = faults(two, structures={"gland": [1]})
    wanted = [
        ("A/Mask/case0.nii.gz (site A)", "mask of shape (16, 12, 4) for image case0.nii.gz of shape (16, 16, 4)"),
        ("A/Mask/case1.nii.gz (site A)", "empty mask"),
        ("B/Image/case0.nii.gz (site B)", "corrupt"),
        ("B/Mask/case1.nii.gz (site B)", "labels that are not declared: 7"),
        ("B/Mask/case2.nii.gz (site B)", "affines differ"),
        ("B/Image/case3.nii.gz (site B)", "not finite"),
    ]
    assert len(lines) == len(wanted)
    for line, (where, what) in zip(lines, wanted, strict=True):
        assert line.startswith("error: ") and where in line and what in line and "\n" not in line


CORRUPT = {
    "empty": b"",
    "text": b"not an image",
    "half a gzip": b"\x1f\x8b\x08\x00broken",
    "a header of rubbish": gzip.compress(b"\x5c\x01\x00\x00" + b"\xff" * 700, mtime=0),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_files(two: Path, content: bytes) -> None:
    (two / "A/Image/case0.nii.gz").write_bytes(content)
    lines = faults(two)
    assert "DICOM" not in lines[0], "the fault of the reader that the name asks for"
    assert len(lines) == 1 and "A/Image/case0.nii.gz (site A): corrupt" in lines[0]


def test_corrupt_picture(tmp_path: Path) -> None:
    for i in range(4):
        tiny.picture(tmp_path / "S" / f"i{i}.png", np.full((16, 16), 50 * i, np.uint8))
    tiny.picture(tmp_path / "S/m.png", np.eye(16, dtype=np.uint8) * 255)
    whole = (tmp_path / "S/i1.png").read_bytes()
    (tmp_path / "S/i1.png").write_bytes(whole[: len(whole) - 30])
    items = [{"image": f"i{i}.png", "label": "m.png"} for i in range(4)]
    (tmp_path / "S/datalist.json").write_text(json.dumps({"training": items}))
    assert "i1.png (site S): corrupt" in faults(tmp_path, lists={"S": "S"})[0]


def test_empty_masks_may_be_dropped_or_kept(two: Path) -> None:
    tiny.nifti(two / "A/Mask/case1.nii.gz", np.zeros((16, 16, 4), np.uint8))
    assert build(two, dims=3, size=None, empty="drop").num_train == 5
    assert build(two, dims=3, size=None, empty="keep").num_train == 6


def test_repeated_images_and_split_cases(two: Path) -> None:
    (two / "B/Image/case3.nii.gz").write_bytes((two / "A/Image/case0.nii.gz").read_bytes())
    line = faults(two)[0]
    assert "B/Image/case3.nii.gz (test of site B): the same image as" in line and "(train of site A)" in line
    listed = json.loads((two / "A/datalist.json").read_text())
    (two / "A/datalist.json").write_text(json.dumps({**listed, "testing": listed["training"][:1]}))
    assert "case case0 is in train and in test" in faults(two)[0]


def test_sizes_that_differ_or_do_not_fit_the_net(two: Path) -> None:
    shape = (16, 16, 6)
    tiny.nifti(two / "B/Image/case1.nii.gz", tiny.scan(np.random.default_rng(0), tiny.ellipsoid(shape)))
    tiny.nifti(two / "B/Mask/case1.nii.gz", tiny.ellipsoid(shape).astype(np.uint8))
    line = faults(two, dims=3, size=None)[0]
    assert "B/Image/case1.nii.gz (site B)" in line and "(6, 16, 16)" in line and "(4, 16, 16)" in line
    tiny.site(two, "B")
    net = registry.load("model", "unet")
    with pytest.raises(XutrainError, match=r"case0.nii.gz \(site A\)"):
        net.build(net.Options(), build(two, dims=3, size=None))


def test_patches_of_volumes_of_different_sizes(two: Path) -> None:
    """With patches, volumes of several sizes (and smaller than a patch) are padded to one."""
    shape = (12, 20, 6)
    tiny.nifti(two / "B/Image/case0.nii.gz", tiny.scan(np.random.default_rng(0), tiny.ellipsoid(shape)))
    tiny.nifti(two / "B/Mask/case0.nii.gz", tiny.ellipsoid(shape).astype(np.uint8))
    task = build(two, dims=3, size=None, patch=[8, 8, 8])
    assert task.scans.images.shape[2:] == (8, 20, 16) and task.input_shape == (1, 8, 8, 8)
    assert task.batch(torch.arange(4), Key(0)).inputs.shape == (4, 1, 8, 8, 8)
    assert int(task.scans.masks[task.scans.cases.index("B/case0")].sum()) == int(tiny.ellipsoid(shape).sum())


def test_lists_that_are_wrong(two: Path) -> None:
    assert faults(two, lists={}) and "no sites" in faults(two, lists={})[0]
    assert "no such datalist" in faults(two, lists={"A": "A", "X": "nowhere"})[0]
    (two / "B/datalist.json").write_text("{")
    assert "B/datalist.json (site B): not a datalist" in faults(two)[0]
    for content, what in (
        ({"training": []}, "a site without data"),
        ({"validation": [], "testing": [{"image": "a", "label": "b"}]}, "a site without data"),
        ({"training": ["a.png"]}, "not a datalist"),
        ({"training": [{"image": "a.png"}]}, "training item 0 has no label"),
        ([], "a site without data"),
    ):
        (two / "B/datalist.json").write_text(json.dumps(content))
        line = faults(two)[0]
        assert "(site B)" in line and what in line


def test_other_dimensions_and_channels(two: Path) -> None:
    assert "has 1 channels, and data.channels is 3" in faults(two, channels=3)[0]
    tiny.picture(two / "A/flat.png", np.zeros((16, 16), np.uint8))
    listed = json.loads((two / "A/datalist.json").read_text())
    listed["training"][0]["image"] = "flat.png"
    (two / "A/datalist.json").write_text(json.dumps(listed))
    assert "flat.png (site A): has 2 spatial dimensions" in faults(two, dims=3, size=None)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"size": [16]},
        {"dims": 3},
        {"window": [2.0, 1.0]},
        {"size": [16, 16], "patch": [32, 32]},
        {"mask_code": "refuge"},
        {"structures": {}},
        {"spacing": [1.0]},
        {"spacing": [1.0, 0.0, 1.0]},
        {"lists": {"a/b": "a"}},
        {"unseen": {"": "a"}},
    ],
)
def test_options_that_contradict(options: dict[str, object]) -> None:
    from pydantic import ValidationError

    cls = registry.load("dataset", "medical_datalists")
    with pytest.raises(ValidationError):
        cls.Options(**{"lists": {"A": "a"}, **options})
    with pytest.raises(ValidationError, match="trains too"):
        cls.Options(lists={"A": "a"}, unseen={"A": "a"})


def test_missing_reader_is_a_data_error(two: Path) -> None:
    listed = json.loads((two / "A/datalist.json").read_text())
    (two / "A/x.mhd").write_text("ObjectType = Image")
    listed["training"][0]["image"] = "x.mhd"
    (two / "A/datalist.json").write_text(json.dumps(listed))
    with pytest.raises(DataError, match=r"x\.mhd"):
        build(two)


def test_package_that_is_not_installed(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.utils import OptionalImportError

    def absent(*_: object, **__: object) -> None:
        raise OptionalImportError("import nibabel (No module named 'nibabel').")

    monkeypatch.setattr("monai.data.NibabelReader.__init__", absent)
    with pytest.raises(DataError) as caught:
        build(two)
    assert "nibabel" in caught.value.issues[0].what and "xutrain[medical]" in caught.value.issues[0].hint
