"""Real brains of three sites with grey and white matter, as axial slices. One volume a site: see how it is split."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from xutrain.data import store
from xutrain.data.brains_files import FILES, GREY, WHITE
from xutrain.data.medical_lists import share
from xutrain.data.segmentation import Scans, SegmentationOptions, SegmentationTask
from xutrain.errors import Issue, RecipeError
from xutrain.registry import dataset

Site = Literal["mni152", "colin27", "macaque"]
SPLITS = {"training": "train", "validation": "val", "testing": "test"}


@dataset(
    "medical_brains", verbs=("federate",), summary="real brains, grey and white matter, three sites (MNI152, Colin27, macaque), 2-D slices"
)
class MedicalBrains:
    """Each site is one volume, so the split is by blocks of neighbouring slices with a gap between blocks, dealt by NVFlare's rule: test
    slices are of the same head as training slices, which says how well a site is learnt and nothing of new patients. The unseen
    site, when there is one, is another head (or species)."""

    class Options(SegmentationOptions):
        name: str = "medical_brains"
        sites: list[Site] = Field(["mni152", "colin27", "macaque"], min_length=1, description="Sites that take part in training.")
        unseen: list[Site] = Field([], description="Sites of which only test slices are used.")
        size: int = Field(64, ge=16, description="Slices are padded to squares and brought to this side, in pixels.")
        block: int = Field(6, ge=1, description="Neighbouring slices that stay in one split.")
        gap: int = Field(1, ge=0, description="Slices left out between blocks.")
        least: float = Field(0.05, gt=0, lt=1, description="Slices with a smaller share of labelled pixels are left out.")

        @model_validator(mode="after")
        def _distinct(self) -> MedicalBrains.Options:
            if len({*self.sites, *self.unseen}) < len(self.sites) + len(self.unseen):
                raise ValueError("sites: a site is listed twice, or is unseen too")
            return self

    @staticmethod
    def build(options: Options, seed: int) -> SegmentationTask:
        """Raises DataError with the command to run where the set is not prepared, RecipeError where a site has too few slices."""
        arrays = store.open_arrays("medical_brains")
        names = (*options.sites, *options.unseen)
        missing = [f"{site}_{part}" for site in FILES for part in ("image", "labels") if f"{site}_{part}" not in arrays]
        if missing:
            raise store.missing("medical_brains", store.data_root() / "medical_brains", f"lacks {', '.join(missing)}")
        parts: dict[str, list[Scans]] = {}
        for i, site in enumerate(names):
            for split, scans in _site(site, i, arrays, options, known=site in options.sites).items():
                parts.setdefault(split, []).append(scans)
        splits = {split: Scans.join(scans) for split, scans in parts.items()}
        return SegmentationTask("medical_brains", splits, ("grey", "white"), names, loss=options.loss, augment=options.augment)


def _site(site: str, number: int, arrays: dict[str, np.ndarray], options: MedicalBrains.Options, known: bool) -> dict[str, Scans]:
    """Slices of one site by split; all of them are test slices of an unseen site."""
    labels = arrays[f"{site}_labels"]
    rows = np.flatnonzero((labels > 0).mean(axis=(1, 2)) >= options.least)
    if not len(rows):
        raise RecipeError(Issue("data.least", f"leaves {site} no slices", options.least, "lower it"))
    pitch = options.block + options.gap
    inside = np.arange(len(rows)) % pitch < options.block
    blocks = [f"{site}/block{at // pitch:02d}" for at in range(len(rows))]
    images, masks = _resized(arrays[f"{site}_image"][rows], labels[rows], options.size)
    cases = share(blocks) if known else {"testing": blocks}
    if known and not (cases["training"] and cases["testing"]):
        what = f"leaves {site} {len(set(blocks))} blocks of its {len(rows)} slices, too few to train and to test on"
        raise RecipeError(Issue("data.block", what, options.block, "smaller blocks, or a lower data.least"))
    found = {}
    for key, mine in cases.items():
        chosen = np.flatnonzero(inside & np.isin(blocks, mine))
        if len(chosen):
            at = torch.from_numpy(chosen)
            found[SPLITS[key]] = Scans(images[at], masks[at], torch.full((len(at),), number), tuple(blocks[j] for j in chosen))
    return found


def _resized(images: np.ndarray, labels: np.ndarray, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 (n, 1, size, size) in 0 .. 1 and masks uint8 (n, 2, size, size): means over areas, masks cut at one half."""
    from monai.transforms import Compose, Resize, SpatialPad

    side = max(images.shape[1:])
    bring = Compose([SpatialPad((side, side)), Resize((size, size), mode="area")])  # slices travel as channels
    planes = [images / np.float32(255), (labels == GREY).astype(np.float32), (labels == WHITE).astype(np.float32)]
    image, grey, white = (torch.as_tensor(np.asarray(bring(torch.from_numpy(plane)))) for plane in planes)
    return image[:, None].contiguous(), torch.stack([grey >= 0.5, white > 0.5], 1).to(torch.uint8)
