"""Colour photographs of the retina with optic disc and cup, from their public sources, as they are downloaded.

Every image is written with a mask 0 background, 1 rim, 2 cup (the disc is 1 and 2), cut to a square of three disc diameters about
the disc, in test images too: the experiments of the literature work on such regions. DoFE's bundle is cut already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from xutrain.data.fundus_contours import trace
from xutrain.data.medical_cases import Case, Expected, LeftOut, Pair, files_of, junk, nothing
from xutrain.data.store import Files
from xutrain.errors import DataError, Issue

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
#: grey values of REFUGE's and DoFE's masks: 0 cup, 128 rim, 255 background
CUP, DISC = 50, 200
DIAMETERS = 3.0
EXPECTED = {
    "fundus_drishti": {"": Expected(101)},
    "fundus_rim_one": {"": Expected(159)},
    "fundus_refuge": {"train": Expected(400), "validation": Expected(400), "test": Expected(400)},
    "fundus_riga": {"binrushed": Expected(195), "magrabia": Expected(94), "messidor": Expected(460)},
    "fundus_origa": {"": Expected(650)},
    "fundus_dofe": {"domain1": Expected(101), "domain2": Expected(159), "domain3": Expected(400), "domain4": Expected(400)},
}
Sites = dict[str, list[Case]]


def read(name: str, path: Path) -> Files:
    """Find the images of source ``name`` below ``path``; they are read when the set is written.

    Raises:
        DataError: nothing of the source is there, or images without masks (all of them are named).
    """
    finder: Callable[[str, Path], Sites] = {
        "fundus_drishti": _drishti,
        "fundus_rim_one": _rim_one,
        "fundus_refuge": _refuge,
        "fundus_riga": _riga,
        "fundus_origa": _origa,
        "fundus_dofe": _dofe,
    }[name]
    notes = [] if name == "fundus_dofe" else ["images are cut about the disc as the masks show it, test images too"]
    return files_of(name, finder(name, path), EXPECTED[name], notes)


def picture(path: Path, mode: str) -> np.ndarray:
    """A picture in Pillow's ``mode`` ("RGB" or "L"), uint8 (H, W, 3) or (H, W). Raises OSError when it is damaged."""
    from PIL import Image

    with Image.open(path) as opened:
        return np.asarray(opened.convert(mode))


def pictures(folder: Path) -> Iterator[Path]:
    """Every picture below a folder, in alphabetical order."""
    return (f for f in sorted(folder.rglob("*")) if f.suffix.lower() in PICTURES and f.is_file() and not junk(f))


def _pair(image: np.ndarray, disc: np.ndarray, cup: np.ndarray, notes: tuple[str, ...] = ()) -> Pair:
    """Nested labels on the square about the disc; a cup outside its disc is cut off and noted."""
    if disc.shape != image.shape[:2] or cup.shape != disc.shape:
        return Pair(image, disc.astype(np.uint8), notes=notes)  # the writer refuses it with both shapes
    outside = int((cup & ~disc).sum())
    if outside:
        notes = (*notes, f"{outside} pixels of the cup lie outside the disc and are left out")
    label = disc.astype(np.uint8) + (cup & disc)
    if not disc.any():
        return Pair(image, label, notes=notes)
    rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
    side = min(round(DIAMETERS * max(np.ptp(rows), np.ptp(columns)) + 1), *disc.shape)
    top, left = (int(np.clip((at[0] + at[-1] + 1 - side) // 2, 0, n - side)) for at, n in zip((rows, columns), disc.shape, strict=True))
    window = (slice(top, top + side), slice(left, left + side))
    return Pair(np.ascontiguousarray(image[window]), np.ascontiguousarray(label[window]), notes=notes)


def _incomplete(name: str, lonely: list[tuple[Path, str]]) -> None:
    if lonely:
        raise DataError(
            *(Issue(f"{where} (site {name})", what, has_value=False, hint="is the download complete?") for where, what in lonely)
        )


def _drishti(name: str, path: Path) -> Sites:
    """Training/Images/<id>.png, Training/GT/<id>/SoftMap/<id>_{ODseg,cupseg}Softmap.png; the same below Test, there in Test_GT."""
    images = {f.stem: f for f in pictures(path) if f.parent.name == "Images"}
    discs = {f.name.split("_ODseg")[0]: f for f in pictures(path) if "_ODseg" in f.name}
    if not images or not discs:
        raise nothing(path, "Drishti-GS1_files/Training/Images/*.png, Training/GT/<id>/SoftMap/*.png, Test/Images, Test/Test_GT")
    cups = {i: f.with_name(f.name.replace("ODseg", "cupseg")) for i, f in discs.items()}
    lonely = [(images[i], f"no soft map of image {i}") for i in images if i not in discs]
    lonely += [(discs[i], f"no image {i}") for i in discs if i not in images]
    _incomplete(name, lonely + [(cups[i], "no such cup mask") for i in cups if not cups[i].is_file()])

    def load(i: str) -> Pair:
        return _pair(picture(images[i], "RGB"), picture(discs[i], "L") >= 128, picture(cups[i], "L") >= 128)

    return {"": [Case(i, images[i], lambda i=i: load(i)) for i in sorted(images)]}  # type: ignore[misc]


def _rim_one(name: str, path: Path) -> Sites:
    """ "<group>/Stereo Images/N-10-R.jpg" (its left half) and Average_masks/N-10-R-{Disc,Cup}-Avg.png; both eyes are one person."""
    images = {f.stem: f for f in pictures(path) if f.parent.name == "Stereo Images"}
    masks = {f.stem: f for f in pictures(path) if f.parent.name == "Average_masks"}
    if not images:
        raise nothing(path, "Healthy/Stereo Images/N-10-R.jpg and Healthy/Average_masks/N-10-R-Disc-Avg.png; RIM-ONE r3, not RIM-ONE DL")
    _incomplete(
        name,
        [(images[i], f"no {part} mask {i}-{part}-Avg.png") for i in images for part in ("Disc", "Cup") if f"{i}-{part}-Avg" not in masks],
    )

    def load(i: str) -> Pair:
        image = picture(images[i], "RGB")
        half = image.shape[1] // 2
        disc, cup = (picture(masks[f"{i}-{part}-Avg"], "L") >= 128 for part in ("Disc", "Cup"))
        if disc.shape[1] == image.shape[1]:
            disc, cup = disc[:, :half], cup[:, :half]
        return _pair(image[:, :half], disc, cup)

    return {"": [Case(i, images[i], lambda i=i: load(i), person=i.rsplit("-", 1)[0]) for i in sorted(images)]}  # type: ignore[misc]


def _coded(image: Path, mask: Path, cut: bool = True) -> Pair:
    """A mask of REFUGE's grey values."""
    grey, colour = picture(mask, "L"), picture(image, "RGB")
    disc, cup = grey < DISC, grey <= CUP
    return _pair(colour, disc, cup) if cut else Pair(colour, disc.astype(np.uint8) + cup)


def _refuge(name: str, path: Path) -> Sites:
    """*.jpg of the three parts (train g and n, validation V, test T) and Disc_Cup_Masks/**/<same name>.bmp. The cameras differ."""
    found = list(pictures(path))
    masks = {f.stem: f for f in found if "Disc_Cup_Masks" in f.parts}
    images = {f.stem: f for f in found if "Disc_Cup_Masks" not in f.parts and f.stem in masks}
    if not masks:
        raise nothing(path, "Training400/*/g0001.jpg, Disc_Cup_Masks/Glaucoma/g0001.bmp, REFUGE-Validation400/V0001.jpg, ...")
    _incomplete(name, [(masks[i], f"no image of mask {i}") for i in sorted(masks) if i not in images])
    sites: Sites = {}
    for i in sorted(images):
        site = {"V": "validation", "T": "test"}.get(i[0], "train")
        sites.setdefault(site, []).append(Case(i, images[i], lambda i=i: _coded(images[i], masks[i])))  # type: ignore[misc]
    return sites


def _riga(name: str, path: Path) -> Sites:
    """image<n>prime.* is the photograph, image<n>-1 to -6 the same with the contours of six ophthalmologists drawn in."""
    sites: Sites = {}
    for site in ("BinRushed", "Magrabia", "MESSIDOR"):
        roots = [r for r in [path / site, *path.rglob(site)] if r.is_dir()]
        if not roots:
            continue
        found = list(pictures(roots[0]))
        by_stem = {(f.parent, f.stem.lower()): f for f in found}
        cases = []
        for prime in (f for f in found if f.stem.lower().endswith("prime")):
            number = prime.stem.lower().removesuffix("prime")
            drawn = [by_stem[prime.parent, f"{number}-{k}"] for k in range(1, 7) if (prime.parent, f"{number}-{k}") in by_stem]
            folder = "_".join(prime.parent.relative_to(roots[0]).parts)
            label = f"{folder}_{number}".strip("_")
            cases.append(Case(label, prime, lambda prime=prime, drawn=drawn: _voted(prime, drawn)))  # type: ignore[misc]
        if not cases:
            raise DataError(
                Issue(str(roots[0]), "a site without data: no image<n>prime", has_value=False, hint="unpack the archive, or remove it")
            )
        sites[site.lower()] = cases
    if not sites:
        raise nothing(path, "BinRushed/*/image1prime.jpg, image1-1.jpg ... image1-6.jpg; Magrabia/..., MESSIDOR/...")
    return sites


def _voted(prime: Path, drawn: list[Path]) -> Pair:
    """Pixels that more than half of the readers whose contours could be traced count to disc and cup."""
    if not drawn:
        raise ValueError("no image with contours beside it")
    image = picture(prime, "RGB")
    traced = [found for found in (trace(image, picture(file, "RGB")) for file in drawn) if found is not None]
    if 2 * len(traced) <= len(drawn):
        raise LeftOut(f"contours could be traced in {len(traced)} of {len(drawn)} drawings")
    disc, cup = (np.mean([t[part] for t in traced], axis=0) > 0.5 for part in (0, 1))
    missed = len(drawn) - len(traced)
    return _pair(image, disc, cup, (f"contours of {missed} of {len(drawn)} readers could not be traced",) if missed else ())


def _origa(name: str, path: Path) -> Sites:
    """One picture and one mask (label picture 0, 1, 2 or MAT file) of the same name, in folders of any names."""
    mats = {f.stem: f for f in sorted(path.rglob("*.mat")) if not junk(f)}
    found = list(pictures(path))
    labels = {f.stem: f for f in found if "mask" in f.parent.name.lower()}
    images = {f.stem: f for f in found if f.stem not in labels or f != labels[f.stem]}
    masks = {**labels, **mats}
    both = sorted(i for i in images if i in masks)
    if not both:
        raise nothing(path, "Images/001.jpg and Masks/001.png (0, 1, 2), or 001.mat")
    _incomplete(name, [(images[i], f"no mask of image {i}") for i in sorted(images) if i not in masks])

    def load(i: str) -> Pair:
        file = masks[i]
        if file.suffix == ".mat":
            from scipy.io import loadmat

            arrays = [v for k, v in loadmat(file).items() if not k.startswith("__") and np.ndim(v) == 2]
            if len(arrays) != 1:
                raise ValueError(f"{file.name} holds {len(arrays)} matrices, one is wanted")
            label = np.asarray(arrays[0])
        else:
            label = picture(file, "L")
        if label.max() > 2:
            raise ValueError(f"{file.name} has labels above 2: {sorted(set(label.ravel().tolist()))[-3:]}")
        return _pair(picture(images[i], "RGB"), label >= 1, label >= 2)

    return {"": [Case(i, images[i], lambda i=i: load(i)) for i in both]}  # type: ignore[misc]


def _dofe(name: str, path: Path) -> Sites:
    """Fundus/Domain<k>/{train,test}/ROIs/{image,mask}/*.png: cut already, with its own split."""
    sites: Sites = {}
    lonely = []
    for k in range(1, 5):
        roots = [r for r in [path / f"Domain{k}", *path.rglob(f"Domain{k}")] if r.is_dir()]
        cases = []
        for split, key in (("train", "training"), ("test", "testing")) if roots else ():
            for image in pictures(roots[0] / split / "ROIs" / "image"):
                mask = image.parent.parent / "mask" / image.name
                if not mask.is_file():
                    lonely.append((mask, "no such mask"))
                load = lambda image=image, mask=mask: _coded(image, mask, cut=False)  # noqa: E731
                cases.append(Case(f"{key[:-3]}_{image.stem}", image, load, split=key))
        if roots and not cases:
            raise DataError(Issue(str(roots[0]), "a site without data", has_value=False, hint="remove the empty folder"))
        if cases:
            sites[f"domain{k}"] = cases
    _incomplete(name, lonely)
    if not sites:
        raise nothing(path, "Fundus/Domain1/train/ROIs/image/*.png and mask/*.png, Domain1/test/..., Domain2 to Domain4")
    return sites
