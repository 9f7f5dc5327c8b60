"""T1-weighted brains that ship in packages, with grey and white matter: three sites as different as scanners and species are.

MNI152 (nilearn): the mean of 152 people, brain only, with its own tissue maps. Colin27 and the INIA19 macaque (mricron-data): one man's
mean of 27 scans, head and all, and the mean of 19 rhesus macaques, brain only. The latter two come without tissue maps: their labels are
made here, by clustering the brain's intensities in three classes (fluid, grey, white). No torch here.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from xutrain.data.archive import collect, damaged, gunzip
from xutrain.data.medical_cases import unreadable
from xutrain.data.store import Content
from xutrain.errors import DataError, Issue

MNI = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
#: site to the files of its image, and of what its labels are made from
FILES = {
    "mni152": (MNI.format("t1"), MNI.format("gm"), MNI.format("wm")),
    "colin27": ("ch2.nii.gz", "ch2bet.nii.gz"),
    "macaque": ("inia19-t1-brain.nii.gz",),
}
GREY, WHITE = 1, 2


def read(name: str, path: Path) -> Content:
    """``<site>_image`` and ``<site>_labels`` (0, 1 grey, 2 white), uint8 of shape (D, H, W): axial slices from below, front up.

    Raises:
        DataError: files are missing (all are named) or damaged, or nibabel is not installed.
    """
    wanted = [file for files in FILES.values() for file in files]
    found: dict[str, bytes] = {}
    for files in FILES.values():
        found |= collect(path, lambda base, names=frozenset(files): base in names)  # type: ignore[misc]
    missing = [file for file in wanted if file not in found]
    if missing:
        hint = "the wheel of nilearn and the folder templates of mricron-data hold them"
        raise DataError(*(Issue(str(path), f"no {file} in here", has_value=False, hint=hint) for file in missing))
    content: Content = {}
    for site, files in FILES.items():
        volumes = [_volume(file, found[file]) for file in files]
        shapes = {v.shape for v in volumes}
        if len(shapes) > 1:
            raise damaged(files[0], f"volumes of site {site} differ in shape: {sorted(shapes)}")
        image = volumes[0]
        if site == "mni152":
            labels = _from_maps(volumes[1], volumes[2])
        else:
            labels = tissues(volumes[-1])
        content[f"{site}_image"] = _bytes(image)
        content[f"{site}_labels"] = labels
    return content


def _volume(file: str, data: bytes) -> np.ndarray:
    """Voxels in LPS with axes (D, H, W), float32."""
    try:
        import nibabel
    except ImportError:
        raise DataError(Issue(file, "needs nibabel", has_value=False, hint="pip install 'xutrain[medical]'")) from None
    try:
        image = nibabel.Nifti1Image.from_stream(io.BytesIO(gunzip(file, data)))
        target = nibabel.orientations.axcodes2ornt("LPS")
        turn = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), target)
        voxels = nibabel.orientations.apply_orientation(np.asanyarray(image.dataobj, dtype=np.float32), turn)
    except unreadable() as reason:
        raise damaged(file, reason) from reason
    return np.ascontiguousarray(voxels.transpose(2, 1, 0))


def _from_maps(grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """The likelier of two tissue maps (0 .. 255) where it is above one half."""
    best = np.where(white > grey, WHITE, GREY)
    return np.where(np.maximum(grey, white) > 127.5, best, 0).astype(np.uint8)


def tissues(brain: np.ndarray) -> np.ndarray:
    """Grey (the middle) and white (the brightest) of three intensity clusters among the voxels above 0; k-means on 256 grey levels."""
    from sklearn.cluster import KMeans

    levels = _bytes(brain).astype(np.int64)
    counts = np.bincount(levels[brain > 0], minlength=256)
    used = np.flatnonzero(counts)
    starts = np.percentile(levels[brain > 0], [10, 50, 90])[:, None]
    fitted = KMeans(3, init=starts, n_init=1, algorithm="lloyd").fit(used[:, None], sample_weight=counts[used])
    centres = np.sort(fitted.cluster_centers_[:, 0])
    cuts = (centres[:-1] + centres[1:]) / 2
    labels = (levels > cuts[0]).astype(np.uint8) + (levels > cuts[1])
    return np.where(brain > 0, labels, 0).astype(np.uint8)


def _bytes(image: np.ndarray) -> np.ndarray:
    """Intensities from 0 to the 99.5th percentile of the voxels above 0, as 0 .. 255."""
    top = float(np.percentile(image[image > 0], 99.5))
    return np.clip(np.round(image * (255 / top)), 0, 255).astype(np.uint8)
