"""One image and its mask from disk, checked and brought to the form that nets take. Reading and resampling are MONAI's.

Axes: images are (C, H, W) as stored; volumes are brought to LPS and returned as (C, D, H, W) with the axial slices first, so that a
slice shows as radiologists look at it (front up, the patient's right on the left).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xutrain.data.medical_cases import unreadable
from xutrain.data.medical_lists import Item
from xutrain.errors import DataError, Issue

MaskCode = Literal["labels", "refuge", "files"]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
#: grey values of REFUGE's and DoFE's masks: 0 cup, 128 rim, 255 background
CUP, DISC = 50, 200


@dataclass(frozen=True)
class Form:
    """What samples shall look like; the fields are the options of ``medical_datalists`` of the same names."""

    dims: int
    size: tuple[int, ...] | None
    channels: int
    structures: Mapping[str, list[int]]
    mask_code: MaskCode = "labels"
    window: tuple[float, float] | None = None
    spacing: tuple[float, ...] | None = None
    fit: Literal["resize", "pad"] = "resize"
    empty: Literal["refuse", "drop", "keep"] = "refuse"


@dataclass(frozen=True)
class Loaded:
    """Samples of one item: images (n, C, ...), masks uint8 (n, S, ...), and a hash of the image as stored.

    ``spacing`` is the distance of neighbouring pixels in millimetres, axis by axis as in the samples; None of pictures.
    """

    images: Tensor
    masks: Tensor
    digest: str
    spacing: tuple[float, ...] | None = None


def load(item: Item, form: Form) -> Loaded:
    """Read, check, resample. A volume gives one sample in 3-D, and in 2-D one for every axial slice that has some structure.

    Raises:
        DataError: a file that cannot be read, a mask of another shape or place, values that are not a number, labels that are not
            declared, an empty mask. It names file and site.
    """
    image, label = read(item.image, item.site, form.channels), read(item.label, item.site, 0)
    fault = _misfit(item, image, label, form)
    if fault is not None:
        raise DataError(fault)
    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    masks = _structures(label, form)
    if not masks.any() and form.empty == "refuse":
        raise DataError(
            Issue(
                f"{item.label[0]} (site {item.site})", "empty mask", has_value=False, hint="mend it, or data.empty=drop leaves the case out"
            )
        )
    spacing: tuple[float, ...] | None = None
    if image.dim() == 4:
        image, masks, spacing = _upright(image, masks, form)
    image = _scaled(image, form)
    if image.dim() == 4 and form.dims == 2:
        images, masks = image.movedim(1, 0), masks.movedim(1, 0)
        kept = masks.flatten(1).any(1) if form.empty != "keep" else torch.ones(len(masks), dtype=torch.bool)
        images, masks = images[kept], masks[kept]
    else:
        images, masks = image[None], masks[None]
        if form.empty == "drop" and not masks.any():
            images, masks = images[:0], masks[:0]
    if spacing is not None:
        spacing = _sample_spacing(spacing[-form.dims :], tuple(images.shape[2:]), form)
    if form.size is not None and len(images):
        pairs = [_fitted(i, m, form) for i, m in zip(images, masks, strict=True)]
        images, masks = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    return Loaded(images.contiguous(), (masks >= 0.5).to(torch.uint8).contiguous(), digest, spacing)


def _sample_spacing(spacing: tuple[float, ...], sides: tuple[int, ...], form: Form) -> tuple[float, ...]:
    """Millimetres between neighbouring pixels once ``sides`` are brought to size; corners are aligned, so the gaps share the length."""
    if form.size is None or form.fit == "pad":
        return spacing
    return tuple(gap * max(old - 1, 1) / max(new - 1, 1) for gap, old, new in zip(spacing, sides, form.size, strict=True))


@functools.cache
def loader() -> Any:
    """MONAI's LoadImage, to be called with the reader that a file needs; other readers are not tried."""
    from monai.transforms import LoadImage

    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)  # says at every start what it cannot use
    return LoadImage(image_only=True, ensure_channel_first=True)


def read(paths: tuple[Path, ...], site: str, channels: int) -> Any:
    """Files as one float32 MetaTensor (C, ...), several files as channels. ``channels`` 3 or 1 converts pictures, 0 takes them as they are.

    Raises:
        DataError: corrupt, or a format that needs a package that is not there.
    """
    from xutrain.data.medical_volumes import check_order

    parts = []
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if path.is_dir():
                    check_order(path)
                parts.append(loader()(str(path), reader=_reader(path, channels)))
        except ImportError as reason:  # MONAI's OptionalImportError is one
            raise lacking(str(path), reason) from None
        except unreadable() as reason:
            text = str(reason).strip().splitlines() or [type(reason).__name__]
            raise DataError(
                Issue(f"{path} (site {site})", f"corrupt or not an image: {text[-1][:160]}", has_value=False, hint="take another copy")
            ) from reason
    if len({tuple(p.shape[1:]) for p in parts}) > 1:
        shapes = ", ".join(str(tuple(p.shape[1:])) for p in parts)
        raise DataError(Issue(f"{paths[1]} (site {site})", f"the files of one case differ in shape: {shapes}", has_value=False))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def lacking(where: str, reason: ImportError) -> DataError:
    """The error for a reader whose package is not installed."""
    what = f"cannot be read here: {str(reason).strip().splitlines()[0][:120]}"
    return DataError(Issue(where, what, has_value=False, hint="pip install 'xutrain[medical]'"))


def _reader(path: Path, channels: int) -> Any:
    from monai.data import NibabelReader, PILReader, PydicomReader

    name = path.name.lower()
    if name.endswith(PICTURES):
        mode = {1: "L", 3: "RGB"}.get(channels)
        return PILReader(reverse_indexing=False, converter=None if mode is None else lambda picture: _in_colours(picture, mode))
    if path.is_dir() or name.endswith(".dcm"):
        return PydicomReader()
    if name.endswith((".mhd", ".mha", ".nrrd")):
        hint = "xutrain data prepare converts such sets; elsewhere convert them to NIfTI"
        raise DataError(Issue(str(path), "datalists are read from NIfTI, DICOM and pictures", has_value=False, hint=hint))
    return NibabelReader()


def _in_colours(picture: Any, mode: str) -> Any:
    """A Pillow picture in ``mode``; 16-bit, integer and float pictures as they are, since Pillow would cut them at 255."""
    return picture if picture.mode.startswith(("I", "F")) else picture.convert(mode)


def _misfit(item: Item, image: Any, label: Any, form: Form) -> Issue | None:
    """The first thing that is wrong with a pair, or None."""
    where, mask = f"{item.image[0]} (site {item.site})", f"{item.label[0]} (site {item.site})"
    dims = image.dim() - 1
    if dims not in (2, 3) or dims < form.dims:
        return Issue(where, f"has {dims} spatial dimensions, and data.dims is {form.dims}", has_value=False, hint="change data.dims")
    if image.shape[0] != form.channels:
        return Issue(
            where, f"has {image.shape[0]} channels, and data.channels is {form.channels}", has_value=False, hint="change data.channels"
        )
    if image.shape[1:] != label.shape[1:]:
        what = f"mask of shape {tuple(label.shape[1:])} for image {item.image[0].name} of shape {tuple(image.shape[1:])}"
        return Issue(mask, what, has_value=False, hint="the mask must lie on the grid of its image")
    if dims == 3 and np.abs(np.asarray(image.affine) - np.asarray(label.affine)).max() > 1e-3:
        return Issue(
            mask, f"lies elsewhere than image {item.image[0].name}: their affines differ", has_value=False, hint="resample the mask"
        )
    if not bool(torch.isfinite(image).all()):
        return Issue(where, "has values that are not finite", has_value=False, hint="mend the image")
    wanted = len(form.structures) if form.mask_code == "files" else 1
    if label.shape[0] != wanted:
        if form.mask_code == "files":
            return Issue(
                mask, f"{label.shape[0]} mask channels for {wanted} structures", has_value=False, hint="list one mask file a structure"
            )
        if not bool((label == label[:1]).all()):
            return Issue(mask, f"has {label.shape[0]} different channels", has_value=False, hint="store labels in one channel")
    if form.mask_code == "labels":
        return _unknown_labels(mask, label, form)
    return None


def _unknown_labels(mask: str, label: Any, form: Form) -> Issue | None:
    declared = {0, *(value for values in form.structures.values() for value in values)}
    values = torch.unique(torch.as_tensor(label))
    if any(not values_of for values_of in form.structures.values()):
        return None if bool((values >= 0).all()) else Issue(mask, "has negative labels", float(values.min()), "labels are 0 and above")
    odd = [v for v in values.tolist() if v not in declared]
    if not odd:
        return None
    some = ", ".join(f"{v:g}" for v in odd[:6])
    return Issue(mask, f"labels that are not declared: {some}", has_value=False, hint=f"declared in data.structures: {sorted(declared)}")


def _structures(label: Any, form: Form) -> Tensor:
    """Masks, float32 of shape (S, ...), in 0 and 1."""
    plain = label.as_tensor().float()
    if form.mask_code == "files":
        return (plain > 0).float()
    first = plain[0]
    if form.mask_code == "refuge":
        known = {"disc": first < DISC, "cup": first <= CUP}
        return torch.stack([known[name] for name in form.structures]).float()
    found = [torch.isin(first, torch.tensor(values, dtype=first.dtype)) if values else first > 0 for values in form.structures.values()]
    return torch.stack(found).float()


def _upright(image: Any, masks: Tensor, form: Form) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Volumes (C, x, y, z) in any orientation as (C, D, H, W) in LPS, resampled to ``spacing`` (millimetres, D H W) when given.

    The third value is the spacing of what comes out.
    """
    from monai.data import MetaTensor
    from monai.transforms import Orientation, Spacing

    pair = [image, MetaTensor(masks, affine=image.affine)]
    turned: list[Any] = [Orientation(axcodes="LPS", labels=None)(each) for each in pair]
    if form.spacing is not None:
        pixdim = form.spacing[::-1]
        modes = ("bilinear", "nearest")
        turned = [Spacing(pixdim, mode=mode)(each) for each, mode in zip(turned, modes, strict=True)]
    first, second = (torch.from_numpy(each.numpy()).permute(0, 3, 2, 1) for each in turned)
    gaps = np.linalg.norm(np.asarray(turned[0].affine, dtype=float)[:3, :3], axis=0)
    return first, second, tuple(float(gap) for gap in gaps[::-1])


def _scaled(image: Any, form: Form) -> Tensor:
    """Intensities in 0 .. 1: the window clipped, or without one from the minimum to the 99th percentile of the image."""
    plain: Tensor = image.as_tensor() if hasattr(image, "as_tensor") else image
    if form.window is None:
        values = plain.numpy()
        low, high = float(values.min()), float(np.percentile(values, 99))
    else:
        low, high = form.window
    return ((plain.float() - low) / max(high - low, 1e-8)).clamp(0, 1)


def _fitted(image: Tensor, masks: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Linear interpolation with aligned corners, masks cut at 0.5 afterwards; or padding and cropping about the centre."""
    from monai.transforms import Resize, ResizeWithPadOrCrop
    from monai.utils import convert_to_tensor

    assert form.size is not None
    if tuple(image.shape[1:]) == form.size:
        return image, masks
    if form.fit == "pad":
        pad = ResizeWithPadOrCrop(form.size)
        return convert_to_tensor(pad(image)), convert_to_tensor(pad(masks))
    resize = Resize(form.size, mode="bilinear" if len(form.size) == 2 else "trilinear", align_corners=True)
    return convert_to_tensor(resize(image)), convert_to_tensor(resize(masks))
