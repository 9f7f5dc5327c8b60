"""Tiny medical files in their true formats: NIfTI, pictures, datalists of several sites."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image


def ellipsoid(shape: tuple[int, ...], at: float = 0.5, radius: float = 0.3) -> np.ndarray:
    """A bool array with an ellipsoid about the relative position ``at``."""
    axes = np.meshgrid(*(np.arange(n) / n - at for n in shape), indexing="ij")
    return sum(a**2 for a in axes) < radius**2


def scan(rng: np.random.Generator, mask: np.ndarray, gain: float = 100, bias: float = 20, noise: float = 5) -> np.ndarray:
    """Intensities, float32: bias + gain inside + noise."""
    return (bias + gain * mask + noise * rng.standard_normal(mask.shape)).astype(np.float32)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def picture(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def site(root: Path, name: str, *, cases: int = 4, shape: tuple[int, ...] = (16, 16, 4), gain: float = 100, seed: int = 0) -> Path:
    """A site of volumes in the project's own layout; returns its datalist (2 training, 1 validation, 1 testing for 4 cases)."""
    rng = np.random.default_rng([seed, len(name), *name.encode()])
    items = []
    for i in range(cases):
        mask = ellipsoid(shape, 0.5, 0.25 + 0.02 * i)
        nifti(root / name / "Image" / f"case{i}.nii.gz", scan(rng, mask, gain))
        nifti(root / name / "Mask" / f"case{i}.nii.gz", mask.astype(np.uint8))
        items.append({"image": f"Image/case{i}.nii.gz", "label": f"Mask/case{i}.nii.gz"})
    splits = {"training": items[: cases - 2], "validation": items[-2:-1], "testing": items[-1:]}
    file = root / name / "datalist.json"
    file.write_text(json.dumps(splits))
    return file


def dicom_series(folder: Path, volume: np.ndarray, *, uid: str = "1.2.3.4", descending: bool = False, names: str = "im{:02d}.dcm") -> Path:
    """Voxels (x, y, z) as one file a slice, axial, 0.5 x 0.5 x 3 mm; ``descending`` numbers the slices from above."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    count = volume.shape[2]
    for number in range(count):
        z = count - 1 - number if descending else number
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.InstanceNumber, data.Modality = uid, number + 1, "MR"
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [10.0, 20.0, 3.0 * z]
        data.PixelSpacing, data.SliceThickness = [0.5, 0.5], 3.0
        data.Columns, data.Rows = volume.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = np.ascontiguousarray(volume[:, :, z].T).astype(np.uint16).tobytes()
        pydicom.dcmwrite(folder / names.format(number + 1), data)
    return folder


def dicom_segmentation(path: Path, zones: dict[int, np.ndarray], *, series: str = "1.2.3.4", flip_rows: bool = False) -> Path:
    """A DICOM-SEG with frames only where a segment is, in no particular order, on the grid of ``dicom_series``."""
    import pydicom
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.pixels import pack_bits
    from pydicom.sequence import Sequence
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.InstanceNumber = "SEG", 1
    data.SegmentSequence = Sequence([_item(SegmentNumber=k, SegmentLabel=f"zone {k}") for k in zones])
    data.ReferencedSeriesSequence = Sequence([_item(SeriesInstanceUID=series)])
    height = next(iter(zones.values())).shape[1]
    orientation = [1, 0, 0, 0, -1, 0] if flip_rows else [1, 0, 0, 0, 1, 0]
    top = 20.0 + 0.5 * (height - 1) if flip_rows else 20.0
    shared = _item(PlaneOrientationSequence=Sequence([_item(ImageOrientationPatient=orientation)]))
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames, groups = [], []
    for k, zone in zones.items():
        for z in np.flatnonzero(zone.any((0, 1)))[::-1].tolist():
            plane = zone[:, :, z].T
            frames.append((plane[::-1] if flip_rows else plane).astype(np.uint8))
            group = Dataset()
            group.PlanePositionSequence = Sequence([_item(ImagePositionPatient=[10.0, top, 3.0 * z])])
            group.SegmentIdentificationSequence = Sequence([_item(ReferencedSegmentNumber=k)])
            groups.append(group)
    data.PerFrameFunctionalGroupsSequence, data.NumberOfFrames = Sequence(groups), len(frames)
    data.Rows, data.Columns = frames[0].shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 1, 1, 0, 0
    data.PixelData = pack_bits(np.concatenate([f.ravel() for f in frames]), pad=True)
    pydicom.dcmwrite(path, data)
    return path


def _item(**values: object):
    from pydicom.dataset import Dataset

    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def itk(path: Path, array: np.ndarray) -> Path:
    """Voxels (x, y, z) as MetaImage with its raw file, or NRRD, by the ending; 0.5 x 0.5 x 3 mm at the origin of ``dicom_series``."""
    import SimpleITK

    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing((0.5, 0.5, 3.0))
    image.SetOrigin((10.0, 20.0, 0.0))
    SimpleITK.WriteImage(image, str(path))
    return path
