"""What every converter of medical sets ends in: one folder a site with images, masks and a datalist, written case by case and checked."""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data.medical_lists import split_items
from xutrain.data.store import Files
from xutrain.errors import DataError, Issue, XutrainError

#: what readers raise on files that are not what their names say
UNREADABLE = (
    RuntimeError,
    OSError,
    ValueError,
    EOFError,
    zlib.error,
    struct.error,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    NotImplementedError,
)


def unreadable() -> tuple[type[Exception], ...]:
    """``UNREADABLE`` and the readers' own classes, of those that are installed."""
    own: list[type[Exception]] = []
    for module, names in (
        ("nibabel.filebasedimages", ("ImageFileError",)),
        ("nibabel.spatialimages", ("HeaderDataError", "HeaderTypeError", "ImageDataError")),
        ("pydicom.errors", ("InvalidDicomError",)),
    ):
        with contextlib.suppress(ImportError):
            own += [getattr(importlib.import_module(module), name) for name in names]
    return (*UNREADABLE, *own)


class LeftOut(Exception):
    """A case that cannot be used, through no fault of the user's copy; the set is written without it and the text becomes a note."""


@dataclass(frozen=True)
class Pair:
    """An image and its labels on one grid.

    Attributes:
        image: volumes (x, y, z), or pictures uint8 (H, W, 3).
        label: uint8 of the same grid, 0 background, 1 and 2 structures.
        affine: voxel to millimetres (RAS) of a volume, else None.
        notes: what was odd about it and is kept as a note.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One image of a source, not read yet.

    Attributes:
        name: stem of the files that are written.
        person: who it is of: images of one person never part.
        where: the file or the folder that an error should name.
        load: reads it.
        split: the source's own split ("training", "testing"), or empty.
    """

    name: str
    where: Path
    load: Callable[[], Pair]
    person: str = ""
    split: str = ""


@dataclass(frozen=True)
class Expected:
    """Cases and slices that show a structure, as published for a complete set; slices 0 where they are not known."""

    cases: int
    slices: int = 0


def files_of(name: str, sites: Mapping[str, Sequence[Case]], expected: Mapping[str, Expected], notes: Sequence[str] = ()) -> Files:
    """The set as files: ``<site>/Image``, ``<site>/Mask`` and ``<site>/datalist.json``; a site named "" stands in the folder itself."""
    return Files(lambda folder: _write(name, folder, sites, expected, list(notes)))


def _write(
    name: str, folder: Path, sites: Mapping[str, Sequence[Case]], expected: Mapping[str, Expected], notes: list[str]
) -> dict[str, Any]:
    problems: list[Issue] = []
    facts: dict[str, Any] = {}
    for site, cases in sites.items():
        items, slices = [], 0
        names = [case.name for case in cases]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            what = f"several cases are called {', '.join(repeated[:3])}"
            problems.append(Issue(_place(cases[names.index(repeated[0])], site or name), what, has_value=False))
            continue
        for case in cases:
            try:
                pair = _checked(case, site or name)
            except LeftOut as reason:
                notes.append(f"{case.name} is left out: {reason}")
                continue
            except XutrainError as fault:
                problems += fault.issues
                continue
            items.append(_store(folder / site, case, pair))
            slices += int((pair.label > 0).any(axis=(0, 1)).sum()) if pair.affine is not None else 1
            notes += [f"{case.name}: {note}" for note in pair.notes]
        if not items:
            problems += (
                [] if problems else [Issue(_place(cases[0], site or name), "a site without data: no case can be used", has_value=False)]
            )
            continue
        own = sorted({case.split for case in cases if case.split})
        listed = _by_own_split(items, cases) if own else split_items(items)
        (folder / site / "datalist.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        people = len({item["case"] for item in items})
        counts = {key: len(value) for key, value in listed.items()}
        facts[site or name] = {"cases": people, "slices": slices, **counts}
        notes.append(_summary(site or name, people, slices, counts, expected.get(site)))
    if problems:
        raise DataError(*problems)
    return {"sites": facts, "notes": notes}


def _place(case: Case, site: str) -> str:
    return f"{case.where} (site {site})"


def _checked(case: Case, site: str) -> Pair:
    """The pair, after the checks of every set. Raises DataError naming file and site."""
    where = _place(case, site)
    try:
        pair = case.load()
    except ImportError as reason:
        what = f"cannot be read here: {str(reason).strip().splitlines()[0][:120]}"
        raise DataError(Issue(where, what, has_value=False, hint="pip install 'xutrain[medical]'")) from None
    except unreadable() as reason:
        if isinstance(reason, XutrainError):  # a RecipeError is a ValueError
            raise
        text = str(reason).strip().splitlines() or [type(reason).__name__]
        raise DataError(Issue(where, f"cannot be read: {text[-1][:160]}", has_value=False, hint="take another copy")) from reason
    grid = pair.image.shape[: pair.label.ndim]
    if grid != pair.label.shape:
        raise DataError(Issue(where, f"mask of shape {pair.label.shape} for an image of shape {grid}", has_value=False))
    if not np.isfinite(pair.image).all():
        raise DataError(Issue(where, "has values that are not finite", has_value=False))
    if not pair.label.any():
        raise DataError(Issue(where, "empty mask", has_value=False, hint="move the case out of the folder to leave it out"))
    return pair


def _store(folder: Path, case: Case, pair: Pair) -> dict[str, str]:
    for part in ("Image", "Mask"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if pair.affine is None:
        from PIL import Image

        image, mask = f"Image/{case.name}.png", f"Mask/{case.name}.png"
        Image.fromarray(pair.image).save(folder / image)
        Image.fromarray(pair.label).save(folder / mask)
    else:
        import nibabel

        image, mask = f"Image/{case.name}.nii.gz", f"Mask/{case.name}.nii.gz"
        whole = pair.image.dtype.kind in "iu" or bool((pair.image == np.round(pair.image)).all())
        fits = whole and pair.image.min() >= -(1 << 15) and pair.image.max() < 1 << 15
        voxels = pair.image.astype(np.int16 if fits else np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, pair.affine), folder / image)
        nibabel.save(nibabel.Nifti1Image(pair.label, pair.affine), folder / mask)
    return {"image": image, "label": mask, "case": case.person or case.name}


def _by_own_split(items: list[dict[str, str]], cases: Sequence[Case]) -> dict[str, list[dict[str, str]]]:
    listed: dict[str, list[dict[str, str]]] = {"training": [], "testing": []}
    split = {case.name: case.split for case in cases}
    for item in items:
        listed[split[Path(item["image"]).name.removesuffix(".png").removesuffix(".nii.gz")]].append(item)
    return listed


def _summary(site: str, people: int, slices: int, counts: dict[str, int], expected: Expected | None) -> str:
    dealt = " / ".join(f"{count} {key}" for key, count in counts.items())
    text = f"{site}: {people} cases, {slices} images or slices with a structure; {dealt}"
    if expected is None:
        return text
    wanted = f"{expected.cases} cases" + (f" with {expected.slices} slices" if expected.slices else "")
    same = people == expected.cases and expected.slices in (0, slices)
    return text + ("" if same else f" - WARNING: the complete set has {wanted}; is the download complete?")


def nothing(path: Path, layout: str) -> DataError:
    """The error for a folder in which nothing of the set was found."""
    return DataError(Issue(str(path), "a site without data: nothing of the set is in here", has_value=False, hint=f"wanted: {layout}"))


def junk(path: Path) -> bool:
    """Files that archives made on a Mac leave about."""
    return path.name.startswith("._") or "__MACOSX" in path.parts
