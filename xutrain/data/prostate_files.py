"""Prostate MRI from its public sources, as they are downloaded, to volumes with a mask of the whole gland.

Layouts, quirks and counts after NVFlare's research/prostate, whose conversions these follow; SAML after FL-MedSegBench.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from xutrain.data.medical_cases import Case, Expected, Pair, files_of, junk, nothing
from xutrain.data.medical_lists import stem
from xutrain.data.medical_volumes import Volume, itk, nifti, segments, series
from xutrain.data.store import Files
from xutrain.errors import DataError, Issue

#: cases and slices with a gland, from NVFlare's tables
EXPECTED = {
    "prostate_i2cvb": Expected(39, 762),
    "prostate_msd": Expected(32, 475),
    "prostate_nci_3t": Expected(40, 555),
    "prostate_nci_dx": Expected(39, 483),
    "prostate_promise12": Expected(50, 778),
    "prostate_prostatex": Expected(98, 1627),
}
SAML = {"RUNMC": 30, "BMC": 30, "I2CVB": 19, "UCL": 13, "BIDMC": 12, "HK": 12}
#: a mask slice is missing; image and label do not match
LEFT_OUT = {"Patient_428260", "ProstateDx-01-0055"}


def read(name: str, path: Path) -> Files:
    """Find the cases of source ``name`` below ``path``; they are read when the set is written.

    Raises:
        DataError: nothing of the source is there, or images or masks without the other (all of them are named).
    """
    finder: Callable[[str, Path], dict[str, list[Case]]] = {
        "prostate_i2cvb": _i2cvb,
        "prostate_msd": _msd,
        "prostate_nci_3t": _nci,
        "prostate_nci_dx": _nci,
        "prostate_promise12": _promise12,
        "prostate_prostatex": _prostatex,
        "prostate_saml": _saml,
    }[name]
    expected = {site: Expected(n) for site, n in SAML.items()} if name == "prostate_saml" else {"": EXPECTED[name]}
    return files_of(name, finder(name, path), expected)


def _gland(image: Volume, mask: Volume) -> Pair:
    """Labels above 0 as 1, the mask's axes turned to those of the image."""
    mask = mask.like(image)
    odd = image.voxels.shape == mask.voxels.shape and mask.differs(image) > 1.0
    notes = (f"the mask's place differs from the image's by up to {mask.differs(image):.1f} mm; the image's is taken",) if odd else ()
    return Pair(image.voxels, (mask.voxels > 0).astype(np.uint8), image.affine, notes)


def _incomplete(name: str, lonely: list[tuple[Path, str]]) -> None:
    if lonely:
        raise DataError(
            *(Issue(f"{where} (site {name})", what, has_value=False, hint="is the download complete?") for where, what in lonely)
        )


def _i2cvb(name: str, path: Path) -> dict[str, list[Case]]:
    """GE/<case>/T2W/*.dcm and GE/<case>/GT/prostate/*.dcm, and the same for Siemens; names of folders may hold spaces."""
    images = sorted(folder for folder in path.rglob("T2W") if folder.is_dir() and not junk(folder))
    if not images:
        raise nothing(path, "GE/<case>/T2W/ and GE/<case>/GT/prostate/, Siemens/<case>/..., unpacked")
    masks = {folder: folder.parent / "GT" / "prostate" for folder in images}
    _incomplete(name, [(masks[i], "no such mask folder") for i in images if not masks[i].is_dir() and _plain(i.parent) not in LEFT_OUT])
    cases = [
        Case(_plain(folder.parent), folder.parent, lambda folder=folder: _gland(series(folder), series(masks[folder])))  # type: ignore[misc]
        for folder in images
    ]
    return {"": [case for case in cases if case.name not in LEFT_OUT]}


def _plain(folder: Path) -> str:
    return folder.name.strip().replace(" ", "_")


def _msd(name: str, path: Path) -> dict[str, list[Case]]:
    """Task05_Prostate/imagesTr/prostate_XX.nii.gz (T2 and ADC) and labelsTr/: the T2 channel, both zones as the gland."""
    images = sorted(f for f in path.rglob("imagesTr/*.nii.gz") if not junk(f))
    if not images:
        raise nothing(path, "Task05_Prostate/imagesTr/*.nii.gz and labelsTr/*.nii.gz")
    masks = {image: image.parent.parent / "labelsTr" / image.name for image in images}
    _incomplete(name, [(masks[i], "no such mask") for i in images if not masks[i].is_file()])
    return {"": [Case(stem(i), i, lambda i=i: _gland(nifti(i), nifti(masks[i]))) for i in images]}  # type: ignore[misc]


def _series_folders(root: Path) -> list[Path]:
    """Folders that hold .dcm files."""
    return sorted({f.parent for f in root.rglob("*.dcm") if not junk(f)})


def _nci(name: str, path: Path) -> dict[str, list[Case]]:
    """<collection>/<case>/<study>/<series>/*.dcm and <case>.nrrd, <case>_truth.nrrd or <case>_correctedLabels.nrrd anywhere."""
    collection, prefix = ("Prostate-3T", "Prostate3T") if name.endswith("3t") else ("PROSTATE-DIAGNOSIS", "ProstateDx")
    masks = {}
    for file in sorted(f for f in path.rglob("*.nrrd") if not junk(f) and f.name.startswith(prefix)):
        masks[stem(file).removesuffix("_truth").removesuffix("_correctedLabels")] = file
    folders: dict[str, list[Path]] = {}
    for root in sorted(r for r in path.rglob(collection) if r.is_dir()):
        for folder in _series_folders(root):
            folders.setdefault(folder.relative_to(root).parts[0], []).append(folder)
    if not masks or not folders:
        raise nothing(path, f"manifest-*/{collection}/<case>/<study>/<series>/*.dcm and the masks <case>.nrrd")
    masks = {case: file for case, file in masks.items() if case not in LEFT_OUT}
    _incomplete(name, [(masks[case], f"no DICOM series of case {case}") for case in masks if case not in folders])
    return {
        "": [Case(case, file, lambda case=case, file=file: _nci_pair(folders[case], file)) for case, file in sorted(masks.items())]  # type: ignore[misc]
    }


def _nci_pair(candidates: list[Path], file: Path) -> Pair:
    """The image in LAS; the NRRD's voxels lie on DICOM's grid (rows from the front), so their second axis is flipped to match."""
    label = np.flip(itk(file).voxels, 1)
    found = [volume for volume in (series(folder).turned("LAS") for folder in candidates) if volume.voxels.shape == label.shape]
    image = found[0] if found else series(candidates[0]).turned("LAS")
    return Pair(image.voxels, np.ascontiguousarray(label > 0).astype(np.uint8), image.affine)


def _promise12(name: str, path: Path) -> dict[str, list[Case]]:
    """CaseXX.mhd with CaseXX.raw, and CaseXX_segmentation.mhd with .raw."""
    images = sorted(f for f in path.rglob("Case*.mhd") if not junk(f) and not f.stem.endswith("_segmentation"))
    if not images:
        raise nothing(path, "CaseXX.mhd, CaseXX.raw, CaseXX_segmentation.mhd, CaseXX_segmentation.raw")
    masks = {image: image.with_name(f"{image.stem}_segmentation.mhd") for image in images}
    lonely = [(masks[i], "no such mask") for i in images if not masks[i].is_file()]
    _incomplete(name, lonely + [(f.with_suffix(".raw"), "no such file") for i in images for f in (i, masks[i]) if not _has_voxels(f)])
    return {"": [Case(i.stem, i, lambda i=i: _gland(itk(i), itk(masks[i]))) for i in images]}  # type: ignore[misc]


def _has_voxels(header: Path) -> bool:
    return not header.is_file() or any(header.with_suffix(end).is_file() for end in (".raw", ".zraw"))


def _prostatex(name: str, path: Path) -> dict[str, list[Case]]:
    """Image/**/PROSTATEx/<case>/<study>/<series>/*.dcm and Mask/**/PROSTATEx/<case>/*/*/*.dcm, the latter one DICOM-SEG a case."""
    found: dict[str, dict[str, list[Path]]] = {"Image": {}, "Mask": {}}
    for part, cases in found.items():
        for root in sorted(r for r in (path / part).rglob("PROSTATEx") if r.is_dir()):
            for folder in _series_folders(root):
                cases.setdefault(folder.relative_to(root).parts[0], []).append(folder)
    images, masks = found["Image"], found["Mask"]
    if not images or not masks:
        raise nothing(path, "Image/<manifest>/PROSTATEx/<case>/<study>/<series>/*.dcm and Mask/<manifest>/PROSTATEx/<case>/*/*/*.dcm")
    _incomplete(name, [(masks[case][0], f"no image of case {case}") for case in sorted(masks) if case not in images])
    return {"": [Case(c, masks[c][0], lambda c=c: _prostatex_pair(images[c], masks[c][0])) for c in sorted(masks)]}  # type: ignore[misc]


def _prostatex_pair(candidates: list[Path], mask: Path) -> Pair:
    """Zones 1, 2 and 4; and 3 (the urethra) where one of them is on the slice."""
    import pydicom

    file = next(f for f in sorted(mask.glob("*.dcm")) if not junk(f))
    meant = [s.SeriesInstanceUID for s in pydicom.dcmread(file, stop_before_pixels=True).get("ReferencedSeriesSequence", [])]
    if len(candidates) > 1:
        first = {folder: next(f for f in sorted(folder.glob("*.dcm")) if not junk(f)) for folder in candidates}
        candidates = [f for f in candidates if pydicom.dcmread(first[f], stop_before_pixels=True).SeriesInstanceUID in meant]
        if len(candidates) != 1:
            raise ValueError("several series of the case, and the segmentation does not say which it belongs to")
    image = series(candidates[0])
    zones = segments(file, image)
    none = np.zeros(image.voxels.shape, dtype=bool)
    gland = zones.get(1, none) | zones.get(2, none) | zones.get(4, none)
    gland |= zones.get(3, none) & gland.any(axis=(0, 1))
    return Pair(image.voxels, gland.astype(np.uint8), image.affine)


def _saml(name: str, path: Path) -> dict[str, list[Case]]:
    """<Site>/CaseXX.nii.gz with CaseXX_segmentation.nii.gz (BMC: _Segmentation); the case is the first six letters."""
    sites: dict[str, list[Case]] = {}
    lonely = []
    for site in SAML:
        folder = next((f for f in [path / site, *path.rglob(site)] if f.is_dir() and not junk(f)), None)
        if folder is None:
            continue
        files = sorted(f for f in folder.glob("*.nii.gz") if not junk(f))
        masks = {f.name[:6]: f for f in files if stem(f).lower().endswith("_segmentation")}
        images = {f.name[:6]: f for f in files if f not in masks.values()}
        lonely += [(images[c], f"no mask of case {c}") for c in images if c not in masks]
        lonely += [(masks[c], f"no image of case {c}") for c in masks if c not in images]
        both = sorted(c for c in images if c in masks)
        sites[site] = [Case(c, images[c], lambda i=images[c], m=masks[c]: _gland(nifti(i), nifti(m))) for c in both]  # type: ignore[misc]
    _incomplete(name, lonely)
    if not sites:
        raise nothing(path, f"<site>/CaseXX.nii.gz and CaseXX_segmentation.nii.gz, sites {', '.join(SAML)}")
    empty = [site for site, cases in sites.items() if not cases]
    if empty:
        raise DataError(Issue(str(path / empty[0]), "a site without data", has_value=False, hint="remove the empty folder"))
    return sites
