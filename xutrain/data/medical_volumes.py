"""Volumes in the formats of their sources: NIfTI, MetaImage and NRRD, DICOM series, DICOM segmentations.

Series are read by MONAI's PydicomReader. Its reader of DICOM-SEG supposes that every segment has a frame on every slice, which files
from the archives do not have; so frames are put in their places here, by their positions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data.medical_cases import junk
from xutrain.errors import DataError, Issue


@dataclass(frozen=True)
class Volume:
    """Voxels (x, y, z) and their affine, voxel to millimetres in RAS."""

    voxels: np.ndarray
    affine: np.ndarray

    def turned(self, axes: str) -> Volume:
        """The same volume with its axes nearest to ``axes``, for example LAS."""
        import nibabel.orientations as turns

        turn = turns.ornt_transform(turns.io_orientation(self.affine), turns.axcodes2ornt(tuple(axes)))
        moved = self.affine @ turns.inv_ornt_aff(turn, self.voxels.shape)
        return Volume(np.ascontiguousarray(turns.apply_orientation(self.voxels, turn)), moved)

    def like(self, other: Volume) -> Volume:
        """The same volume with its axes along those of ``other``."""
        import nibabel.orientations as turns

        return self.turned("".join(turns.aff2axcodes(other.affine)))

    def differs(self, other: Volume) -> float:
        """Largest difference of the two affines."""
        return float(np.abs(self.affine - other.affine).max())


def nifti(path: Path) -> Volume:
    """A NIfTI file; of a 4-D file the first channel."""
    import nibabel

    image: Any = nibabel.load(path)
    voxels = np.asarray(image.dataobj)
    return Volume(voxels[..., 0] if voxels.ndim == 4 else voxels, image.affine)


def series(folder: Path) -> Volume:
    """A DICOM series, one file a slice, stacked by instance number. Raises ValueError where that is not their order in space."""
    from monai.data import PydicomReader

    from xutrain.data.medical_files import loader

    if not any(f.is_file() and not junk(f) for f in folder.iterdir()):
        raise ValueError("no files in the folder of the series")
    check_order(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Any = loader()(str(folder), reader=PydicomReader())
    voxels = image.numpy()[0]  # without the channel
    return Volume(voxels if voxels.ndim == 3 else voxels[..., None], image.affine.numpy())


def check_order(folder: Path) -> None:
    """Refuse a DICOM series whose slices, by instance number, do not follow one another in space, or of which one is missing.

    The reader stacks by instance number and takes one distance for all, so such a volume would be another than the scanned one.
    Files without positions (secondary captures) are left alone. Raises ValueError.
    """
    import pydicom

    heads = [pydicom.dcmread(f, stop_before_pixels=True) for f in sorted(folder.iterdir()) if f.is_file() and not junk(f)]
    if len(heads) < 3 or any("ImagePositionPatient" not in h or "InstanceNumber" not in h for h in heads):
        return
    heads.sort(key=lambda head: int(head.InstanceNumber))
    rows, columns = np.array(heads[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    steps = np.diff([np.dot(np.cross(rows, columns), np.array(h.ImagePositionPatient, dtype=float)) for h in heads])
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError("instance numbers do not follow the slices' positions")
    if np.abs(steps).max() > 1.5 * np.median(np.abs(steps)):
        raise ValueError("a slice of the series is missing: the distances between slices differ")


def itk(path: Path) -> Volume:
    """MetaImage (.mhd with .raw) and NRRD, through SimpleITK. Raises DataError naming the extra when it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise DataError(Issue(str(path), "needs SimpleITK", has_value=False, hint="pip install 'xutrain[medical]'")) from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    image = SimpleITK.ReadImage(str(path))
    direction, spacing = np.array(image.GetDirection()).reshape(3, 3), np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, image.GetOrigin()
    return Volume(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def segments(path: Path, image: Volume) -> dict[int, np.ndarray]:
    """Segment number to its bool mask on the grid of ``image``, from a DICOM segmentation whose frames carry their positions.

    Raises:
        ValueError: not a segmentation, frames of another size, or frames that lie outside the image.
    """
    import pydicom

    data = pydicom.dcmread(path)
    if "SegmentSequence" not in data or "PerFrameFunctionalGroupsSequence" not in data:
        raise ValueError("not a DICOM segmentation")
    frames = np.atleast_3d(data.pixel_array) if data.pixel_array.ndim == 3 else data.pixel_array[None]
    shared = data.SharedFunctionalGroupsSequence[0]
    to_voxels = np.linalg.inv(image.affine)
    found = {int(s.SegmentNumber): np.zeros(image.voxels.shape, dtype=bool) for s in data.SegmentSequence}
    for frame, group in zip(frames, data.PerFrameFunctionalGroupsSequence, strict=True):
        orientation = (group if "PlaneOrientationSequence" in group else shared).PlaneOrientationSequence[0].ImageOrientationPatient
        position = group.PlanePositionSequence[0].ImagePositionPatient
        plane = frame.T  # (columns, rows), as voxels (x, y)
        if plane.shape != image.voxels.shape[:2]:
            raise ValueError(f"frames of {plane.shape} pixels for slices of {image.voxels.shape[:2]}")
        flip = np.array([-1.0, -1.0, 1.0])  # LPS to RAS
        for axis, part in enumerate((orientation[:3], orientation[3:])):
            if np.dot(np.array(part, dtype=float) * flip, image.affine[:3, axis]) < 0:
                plane = np.flip(plane, axis)
        slot = float((to_voxels @ np.array([*(np.array(position, dtype=float) * flip), 1.0]))[2])
        if not -0.5 <= slot <= image.voxels.shape[2] - 0.5:
            raise ValueError(f"a frame at {[float(p) for p in position]} lies outside the image")
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        found[number][:, :, min(round(slot), image.voxels.shape[2] - 1)] |= plane > 0
    return found
