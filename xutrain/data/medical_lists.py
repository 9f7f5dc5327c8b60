"""Datalists of segmentation data (MONAI's and the Medical Segmentation Decathlon's form): who has which cases in which split.

One JSON file a site with the keys ``training``, ``validation`` and ``testing``; items have ``image``, ``label`` and, optionally,
``case`` (the person) and ``fold``. The MSD's own ``dataset.json`` is read by the same function. Torch-free until a list is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.data.store import data_root
from xutrain.errors import DataError, Issue

SPLITS = {"training": "train", "validation": "val", "testing": "test"}
ENDINGS = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".mhd", ".nrrd", ".dcm")


@dataclass(frozen=True)
class Item:
    """One image with its mask.

    Attributes:
        site: name of its site.
        split: train, val or test.
        image, label: one file, or several that are channels of one.
        case: the person or the volume, unique over sites.
    """

    site: str
    split: str
    image: tuple[Path, ...]
    label: tuple[Path, ...]
    case: str

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.image, *self.label)


def share(cases: Sequence[str], parts: tuple[float, float] = (0.5, 0.25), seed: int = 0) -> dict[str, list[str]]:
    """Cases dealt to training, validation and testing by the rule of NVFlare's prostate example.

    Sorted names, ``numpy.random.seed(seed)``, a shuffle of their indices; the first round(.5 n), the next round(.25 n), the rest
    (Python's round: half to even). 32 cases give 16, 8, 8; 39 give 20, 10, 9; 50 give 25, 12, 13; 98 give 49, 24, 25.
    """
    names = sorted(set(cases))
    order = np.arange(len(names))
    np.random.RandomState(seed).shuffle(order)
    first = round(parts[0] * len(names))
    second = first + round(parts[1] * len(names))
    cuts = {"training": order[:first], "validation": order[first:second], "testing": order[second:]}
    return {split: [names[i] for i in rows] for split, rows in cuts.items()}


def split_items(items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Items (each with ``case``) under the keys of a datalist, never one case in two splits. Order: cases as dealt, items as given."""
    held: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        held.setdefault(str(item["case"]), []).append(dict(item))
    return {split: [item for case in cases for item in held[case]] for split, cases in share(list(held)).items()}


def find_list(value: str, root: str) -> Path:
    """The datalist file: as given, else below ``root``, the folder of prepared data, the current folder. Raises DataError."""
    given = Path(value).expanduser()
    tried = (
        [given] if given.is_absolute() else [*([Path(root).expanduser() / given] if root else []), data_root() / given, Path.cwd() / given]
    )
    for place in tried:
        file = place / "datalist.json" if place.is_dir() else place
        if file.is_file():
            return file
    known = given.parts[0] if given.parts else ""
    hint = f"xutrain data prepare {known} --source DIR" if known.startswith(("prostate_", "fundus_")) else "write a datalist"
    places = ", ".join(str(p) for p in tried)
    raise DataError(Issue("data.lists", f"no such datalist (looked for {places})", value, f"{hint}; its form: docs/medical-data.md"))


def read_list(site: str, file: Path, root: str = "", *, unseen: bool = False, fold: int | None = None) -> list[Item]:
    """Items of one site. Paths are relative to ``root``, or else to the folder of the list.

    A list without ``testing`` is dealt by ``share``, or tests on its validation items where it has some; with ``fold``, training items of
    that fold become validation items. Of an unseen
    site only testing items are taken, or all of them where the list has no such key. Items without a label are no use here: an error,
    except under the key ``test`` of the MSD, which is passed over.

    Raises:
        DataError: not JSON, no training items, an item that is not a mapping or lacks image or label.
    """
    from monai.data import load_decathlon_datalist

    where = f"{file} (site {site})"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        keys = [key for key in SPLITS if isinstance(content, dict) and content.get(key)]
        listed = {
            key: load_decathlon_datalist(file, True, key, Path(root).expanduser().resolve() if root else file.parent.resolve())
            for key in keys
        }
    except (OSError, ValueError, TypeError, AttributeError) as reason:
        raise DataError(Issue(where, f"not a datalist: {reason}", has_value=False, hint="its form: docs/medical-data.md")) from reason
    problems = [
        Issue(where, f"{key} item {i} has no {part}", has_value=False, hint="every item needs image and label, a path or a list of paths")
        for key, items in listed.items()
        for i, item in enumerate(items)
        for part in ("image", "label")
        if not _named(item.get(part))
    ]
    if problems:
        raise DataError(*problems)
    if "testing" in listed and unseen:
        listed = {"testing": listed["testing"]}
    elif unseen:
        listed = {"testing": [item for items in listed.values() for item in items]}
    elif fold is not None:
        listed = _fold(listed, fold, where)
    if not unseen and "testing" not in listed and "training" in listed:
        everything = [{**item, "case": _case(item)} for items in listed.values() for item in items]
        listed = split_items(everything) if "validation" not in listed else {**listed, "testing": listed.pop("validation")}
    if not unseen and not listed.get("training"):
        raise DataError(
            Issue(where, "a site without data: no training items", has_value=False, hint="leave the site out, or list it as unseen")
        )
    if not listed.get("testing"):
        raise DataError(
            Issue(where, "no testing items", has_value=False, hint="a site needs at least one, or enough cases to set some aside")
        )
    return [
        Item(site, SPLITS[key], _paths(item["image"]), _paths(item["label"]), f"{site}/{_case(item)}")
        for key, items in listed.items()
        for item in items
    ]


def _fold(listed: dict[str, list[dict[str, Any]]], fold: int, where: str) -> dict[str, list[dict[str, Any]]]:
    items = listed.get("training", [])
    held = [item for item in items if item.get("fold") == fold]
    if not held:
        known = sorted({item["fold"] for item in items if isinstance(item.get("fold"), int)})
        raise DataError(Issue(where, f"no training item of that fold; folds there: {known}", fold, "change data.fold"))
    return {**listed, "training": [item for item in items if item.get("fold") != fold], "validation": held}


def _named(value: Any) -> bool:
    """Whether an item's value is a path, or a list of some."""
    return bool(value) and all(isinstance(v, str) and v for v in (value if isinstance(value, list) else [value]))


def _paths(value: str | list[str]) -> tuple[Path, ...]:
    return tuple(Path(v) for v in ([value] if isinstance(value, str) else value))


def stem(path: Path | str) -> str:
    """File name without its ending; .nii.gz is one ending."""
    name = Path(path).name
    return next((name[: -len(e)] for e in ENDINGS if name.lower().endswith(e)), Path(name).stem)


def _case(item: Mapping[str, Any]) -> str:
    """The person that an item names; else the folder of slices <case>/<number>.png, if the mask's has that name too; else the stem."""
    if item.get("case"):
        return os.path.basename(str(item["case"]))
    image, label = _paths(item["image"])[0], _paths(item["label"])[0]
    sliced = stem(image).isdigit() and stem(label).isdigit() and image.parent.name == label.parent.name
    return image.parent.name if sliced else stem(image)


def missing_files(items: Sequence[Item]) -> list[Issue]:
    """One issue for every file that is not there, and for macOS junk that is listed."""
    found = []
    for item in items:
        for kind, paths in (("image", item.image), ("mask", item.label)):
            for path in paths:
                if path.name.startswith("._"):
                    found.append(
                        Issue(f"{path} (site {item.site})", "is macOS junk, not an image", has_value=False, hint="delete ._* files")
                    )
                elif not path.exists():
                    found.append(
                        Issue(f"{path} (site {item.site})", f"no such {kind}", has_value=False, hint="check data.root and the datalist")
                    )
    return found


def shared_cases(items: Sequence[Item]) -> list[Issue]:
    """Cases that stand in two splits of a site."""
    splits: dict[str, str] = {}
    found = {}
    hint = "split by case, never by slice; the key case of an item says whose image it is"
    for item in items:
        if splits.setdefault(item.case, item.split) != item.split:
            what = f"case {item.case.split('/', 1)[1]} is in {splits[item.case]} and in {item.split}"
            found[item.case] = Issue(f"{item.image[0]} (site {item.site})", what, has_value=False, hint=hint)
    return list(found.values())
