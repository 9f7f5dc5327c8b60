"""The user's own segmentation data: one datalist a site, NIfTI, DICOM or pictures, 2-D slices or 3-D volumes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from xutrain.data.medical_files import Form, MaskCode, load
from xutrain.data.medical_lists import SPLITS, Item, find_list, missing_files, read_list, shared_cases
from xutrain.data.medical_samples import Block, Samples, kept, key_of
from xutrain.data.segmentation import Scans, SegmentationOptions, SegmentationTask
from xutrain.errors import DataError, Issue, RecipeError, XutrainError
from xutrain.registry import dataset

Side = Annotated[int, Field(ge=1)]
Millimetres = Annotated[float, Field(gt=0)]
#: a site's name is part of file names
SiteName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]


@dataset(
    "medical_datalists",
    verbs=("federate",),
    summary="your segmentation data: one MONAI datalist a site, NIfTI, DICOM or pictures, 2-D or 3-D",
)
class MedicalDatalists:
    """Sites in the order of ``lists``, then of ``unseen``. All is read and checked before training, and all faults are shown at once."""

    class Options(SegmentationOptions):
        name: str = "medical_datalists"
        lists: dict[SiteName, str] = Field(
            {}, description="Site to datalist: a JSON file or a prepared set's name, below root, the data folder or here."
        )
        unseen: dict[SiteName, str] = Field({}, description="The same for sites of which only test samples are used.")
        root: str = Field("", description="Folder that the paths in the lists are relative to; empty takes the folder of each list.")
        dims: Literal[2, 3] = Field(
            2, description="2 takes pictures, or the axial slices of volumes that show a structure; 3 takes volumes."
        )
        size: list[Side] | None = Field(
            [256, 256], description="Samples are brought to this size (3-D: depth first); null keeps theirs, padded to one with patch."
        )
        fit: Literal["resize", "pad"] = Field("resize", description="How they are brought to size: interpolation, or padding and cropping.")
        spacing: list[Millimetres] | None = Field(None, description="Resample volumes to these millimetres (depth, height, width) first.")
        channels: Side = Field(1, description="Channels of an image; pictures are converted to grey for 1, to RGB for 3.")
        structures: dict[str, list[int]] = Field(
            {"foreground": []},
            min_length=1,
            description="Structure to its label values in the mask; an empty list means every value above 0.",
        )
        mask_code: MaskCode = Field(
            "labels",
            description="labels as in structures; refuge (0 cup, 128 rim, 255 rest; structures disc, cup); files: one a structure.",
        )
        window: list[float] | None = Field([0.0, 255.0], description="Intensities that become 0 and 1; null: minimum and 99th percentile.")
        patch: list[Side] | None = Field(None, description="Train on random windows of this size; evaluation takes samples whole.")
        fold: int | None = Field(None, description="Training items with this fold number become the validation part.")
        empty: Literal["refuse", "drop", "keep"] = Field("refuse", description="What to do with cases whose mask is empty.")
        limit: int | None = Field(None, ge=1, description="Use only the first cases of every split of every site, this many.")

        @model_validator(mode="after")
        def _agree(self) -> MedicalDatalists.Options:
            for key in ("size", "patch", "spacing"):
                value = getattr(self, key)
                wanted = 3 if key == "spacing" else self.dims
                if value is not None and len(value) != wanted:
                    raise ValueError(f"{key}: must have {wanted} numbers" + ("" if key == "spacing" else " (data.dims)"))
            if self.window is not None and (len(self.window) != 2 or self.window[0] >= self.window[1]):
                raise ValueError("window: must be two ascending numbers")
            if self.mask_code == "refuge" and not set(self.structures) <= {"disc", "cup"}:
                raise ValueError("structures: mask_code refuge knows disc and cup only")
            if self.size and self.patch and any(p > s for p, s in zip(self.patch, self.size, strict=True)):
                raise ValueError("patch: larger than data.size")
            both = sorted(set(self.lists) & set(self.unseen))
            if both:
                raise ValueError(f"unseen: {', '.join(both)} trains too")
            return self

    @staticmethod
    def build(options: Options, seed: int) -> SegmentationTask:
        """Raises DataError with one line for each file that is missing or wrong."""
        if not options.lists:
            hint = "data.lists={siteA: path/a.json, siteB: path/b.json}; see docs/medical-data.md"
            raise RecipeError(Issue("data.lists", "no sites", options.lists, hint))
        names = (*options.lists, *options.unseen)
        items = listed(options)
        form = Form(
            options.dims,
            None if options.size is None else tuple(options.size),
            options.channels,
            options.structures,
            options.mask_code,
            None if options.window is None else (options.window[0], options.window[1]),
            None if options.spacing is None else tuple(options.spacing),
            options.fit,
            options.empty,
        )
        patch = None if options.patch is None else tuple(options.patch)
        items = sorted(items, key=lambda item: list(SPLITS.values()).index(item.split))
        key = key_of((file for item in items for file in item.files), form, patch, names, [(i.site, i.split, i.case) for i in items])
        splits = _splits(kept(key, lambda: _loaded(items, form, names, patch), _padded, patch))
        origin = ""
        if options.size is None and patch is None:
            origin = f"{items[0].image[0]} (site {items[0].site}) and all others are of this size; data.size can change it"
        task = SegmentationTask(
            "medical_datalists",
            splits,
            tuple(options.structures),
            names,
            loss=options.loss,
            augment=options.augment,
            patch=patch,
            origin=origin,
        )
        return task


def listed(options: MedicalDatalists.Options) -> list[Item]:
    """Items of all sites, after the checks that need no reading. Raises DataError with all faults."""
    items: list[Item] = []
    problems: list[Issue] = []
    for sites, unseen in ((options.lists, False), (options.unseen, True)):
        for site, value in sites.items():
            try:
                found = read_list(site, find_list(value, options.root), options.root, unseen=unseen, fold=options.fold)
            except DataError as fault:
                problems += fault.issues
                continue
            items += found if options.limit is None else _first_cases(found, options.limit)
    problems += missing_files(items) + shared_cases(items)
    with_val = {item.site for item in items if item.split == "val"}
    without = [site for site in options.lists if site not in with_val]
    if with_val and without and not problems:
        hint = "give every list a validation key, or none"
        problems.append(Issue("data.lists", f"{without[0]} has no validation items, and {min(with_val)} has", has_value=False, hint=hint))
    if problems:
        raise DataError(*problems)
    return items


def _first_cases(items: list[Item], limit: int) -> list[Item]:
    seen: dict[str, list[str]] = {}
    kept = []
    for item in items:
        cases = seen.setdefault(item.split, [])
        if item.case not in cases:
            cases.append(item.case)
        if cases.index(item.case) < limit:
            kept.append(item)
    return kept


def _loaded(items: list[Item], form: Form, names: tuple[str, ...], patch: tuple[int, ...] | None) -> Iterator[Block]:
    """Samples item by item; of different sizes only with patches. Raises DataError with all faults, after the last item."""
    problems: list[Issue] = []
    found_in: set[str] = set()
    known: dict[str, Item] = {}
    sizes: dict[tuple[int, ...], Item] = {}
    for item in items:
        try:
            found = load(item, form)
        except XutrainError as fault:
            problems += fault.issues
            continue
        problems += _repeated(known.setdefault(found.digest, item), item)
        if not len(found.images):
            continue
        shape = tuple(found.images.shape[2:])
        if sizes and shape not in sizes and patch is None:
            first, other = next(iter(sizes.items()))
            what = f"size {shape}, and {other.image[0].name} of site {other.site} has {first}"
            problems.append(
                Issue(
                    f"{item.image[0]} (site {item.site})",
                    what,
                    has_value=False,
                    hint="set data.size to bring all to one size, or data.patch",
                )
            )
            continue
        sizes.setdefault(shape, item)
        found_in.add(item.split)
        if not problems:
            yield Block(item.split, names.index(item.site), item.case, found.images, found.masks, found.spacing)
    if problems:
        raise DataError(*problems)
    for split in ("train", "test"):
        if split not in found_in:
            raise DataError(Issue("data.lists", f"no {split} sample is left", has_value=False, hint="every mask of it is empty"))


def _padded(samples: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Samples with zeros about them, up to ``sides``, the largest of all."""
    from monai.transforms import SpatialPad
    from monai.utils import convert_to_tensor

    padded: Tensor = convert_to_tensor(SpatialPad((samples.shape[1], *sides))(samples))  # samples travel as channels
    return padded


def _splits(samples: Samples) -> dict[str, Scans]:
    """The samples by split, in the memory that they are mapped to."""
    sites = torch.tensor(samples.sites)
    unknown = [math.nan] * (samples.images.ndim - 2)
    spacings = torch.tensor([unknown if s is None else s for s in samples.spacings], dtype=torch.float64)
    whole = Scans(samples.images, samples.masks, sites, samples.cases, spacings)
    first, found = 0, {}
    for split, count in Counter(samples.splits).items():
        found[split] = whole.part(first, first + count)
        first += count
    return found


def _repeated(first: Item, item: Item) -> list[Issue]:
    """The same pixels in two splits or at two sites, as when SAML is mixed with the sets that it was made from."""
    if first is item or (first.split == item.split and first.site == item.site):
        return []
    what = f"the same image as {first.image[0]} ({first.split} of site {first.site})"
    return [Issue(f"{item.image[0]} ({item.split} of site {item.site})", what, has_value=False, hint="remove one of them")]
