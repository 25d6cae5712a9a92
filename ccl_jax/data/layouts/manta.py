"""MANTA: pictures of five views side by side, each of which becomes five records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ccl_jax.data.layouts.by_class import MASK_ENDING, check_training_images
from ccl_jax.data.layouts.folders import Split, Tree, choose_classes, composed, key_of
from ccl_jax.data.records import Record, picture_size, read_mask

VIEWS = 5
TRAIN = "train/good"
# Folders of test images and of their masks: as published, and as the small release has them.
TESTS = (("test-pixel", "test-pixel/mask"), ("test", "ground_truth"))
_THREADS = 8  # that open headers and masks


def read_manta(tree: Tree, *, dataset: str, classes: Sequence[str] = ()) -> Split:
    """Five records of each strip, `view` "0" to "4" from the left, `sample` the strip.

    `<domain>/<class>/train/good`, `<class>/test-pixel/{good,<defect>}`, and masks by the name of
    their strip in `<class>/test-pixel/mask/<defect>` or, where no two defects share that name,
    in `<class>/test-pixel/mask` (or `test` and `ground_truth`). The root holds the domains, or the
    classes of one.

    A view is anomalous where its part of the mask marks a pixel; the others of a defective strip
    are normal. Where that cannot be known, because a class has no masks or a mask is empty, all
    five count as anomalous. For this, and for the sizes of the crops, every header and the masks
    are opened. A training strip that cannot be read is cut like a readable strip of its class, so
    that whoever opens it names or skips it; for a census so is a test strip.

    Raises:
        ValueError: No such folders, a strip whose width five views do not divide, a test strip or
            mask that cannot be read, a class without a readable strip, masks for some strips of a
            class only, or without a strip.
    """
    folders = _class_folders(tree)
    names = choose_classes(folders, classes, f"{tree.root} has no such class")
    check_training_images(tree, [folders[name] for name in names], TRAIN)
    train: list[Record] = []
    test: list[Record] = []
    for label, name in enumerate(names):
        blank = Record(image=Path(), dataset=dataset, class_name=name, label=label, key="")
        images = tree.images(folders[name] / TRAIN)
        train += [_strip(blank, folders[name], image) for image in images]
        test += _test_strips(blank, tree, folders[name])
    views = _cut([*train, *test], len(train), for_census=tree.for_census)
    first = VIEWS * len(train)
    return Split(views[:first], views[first:], [f"{dataset}/{name}" for name in names])


def _class_folders(tree: Tree) -> dict[str, Path]:
    """The class folders by name, of all domains or of the one that is the root."""
    found: list[Path] = []
    for folder in tree.folders(tree.root):
        inside = [folder] if _is_class(tree, folder) else tree.folders(folder)
        found += [inner for inner in inside if _is_class(tree, inner)]
    if not found:
        raise ValueError(
            f"{tree.root} holds no <domain>/<class>/{TRAIN} with images; name the folder that "
            "MANTA was unpacked to: --config.data.root=/path/to/manta."
        )
    name, uses = Counter(composed(folder.name) for folder in found).most_common(1)[0]
    if uses > 1:
        raise ValueError(
            f"{uses} domains in {tree.root} have a class {name}; rename one, or train on one "
            f"domain: --config.data.root={found[0].parent}."
        )
    return {composed(folder.name): folder for folder in found}


def _is_class(tree: Tree, folder: Path) -> bool:
    return any(inner.name in ("train", "test", "test-pixel") for inner in tree.folders(folder))


def _strip(blank: Record, folder: Path, image: Path) -> Record:
    sample = composed(image.relative_to(folder).as_posix())
    return replace(
        blank, image=image, sample=sample, key=key_of(blank.dataset, folder.parent, image)
    )


def _test_strips(blank: Record, tree: Tree, folder: Path) -> list[Record]:
    """One record for each test strip of a class, with the mask of the whole strip."""
    test, masks = next((t for t in TESTS if tree.folders(folder / t[0])), TESTS[0])
    kinds = [kind for kind in tree.folders(folder / test) if kind != folder / masks]
    strips = [(kind, image) for kind in kinds for image in tree.images(kind)]
    found = _masks(tree, folder / masks)
    of_normal = {
        composed(mask.stem.removesuffix(MASK_ENDING)): mask
        for mask in (tree.images(folder / masks / "good") if tree.for_census else ())
    }
    uses = Counter(composed(image.stem) for kind, image in strips if kind.name != "good")
    records = []
    for kind, image in strips:
        record = _strip(blank, folder, image)
        if kind.name != "good":
            common = ("", composed(image.stem)) if uses[composed(image.stem)] == 1 else None
            mask = found.pop((composed(kind.name), composed(image.stem)), None)
            mask = mask or (found.pop(common, None) if common else None)
            record = replace(record, anomalous=True, defect=composed(kind.name), mask=mask)
        else:
            record = replace(record, mask=of_normal.get(composed(image.stem)))
        records.append(record)
    if found:
        mask = next(iter(found.values()))
        raise ValueError(
            f"{len(found)} masks in {folder / masks} belong to no strip, or to several, the first "
            f"is {mask}; put each into {folder / masks}/<defect>, named as its strip."
        )
    anomalous = [record for record in records if record.anomalous]
    unmasked = [record for record in anomalous if record.mask is None]
    if 0 < len(unmasked) < len(anomalous) and not tree.for_census:
        raise ValueError(
            f"{len(unmasked)} defective strips in {folder} have no mask while others have one, the "
            f"first is {unmasked[0].image!s}; add {folder / masks}/{unmasked[0].defect}/<stem>.png."
        )
    return records


def _masks(tree: Tree, folder: Path) -> dict[tuple[str, str], Path]:
    """Masks by kind of defect, "" for those in the folder itself, and stem of the strip."""
    masks: dict[tuple[str, str], Path] = {}
    for kind in [folder, *tree.folders(folder)]:
        name = composed(kind.name) if kind != folder else ""
        for mask in tree.images(kind) if name != "good" else ():
            key = (name, composed(mask.stem.removesuffix(MASK_ENDING)))
            if key in masks:
                raise ValueError(
                    f"{mask} and {masks[key].name} belong to one strip; delete one of the masks."
                )
            masks[key] = mask
    return masks


def _cut(strips: Sequence[Record], trained: int, *, for_census: bool) -> list[Record]:
    """The views of all strips, of which the first `trained` are for training."""
    lenient = [for_census or index < trained for index in range(len(strips))]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_size_if_readable, strips))
        known = {strip.label: size for strip, size in zip(strips, found, strict=True) if size}
        sizes = [
            # picture_size says why there is none.
            size or (known.get(strip.label) if may_be_bad else None) or picture_size(strip)
            for strip, size, may_be_bad in zip(strips, found, lenient, strict=True)
        ]
        views = pool.map(partial(_views, for_census=for_census), strips, sizes)
        return [view for of_strip in views for view in of_strip]


def _size_if_readable(strip: Record) -> tuple[int, int] | None:
    try:
        return picture_size(strip)
    except ValueError:
        return None  # the caller decides whether that is an error


def _views(strip: Record, size: tuple[int, int], *, for_census: bool) -> list[Record]:
    """The views of a strip of a size, left to right."""
    width, height = size
    step, rest = divmod(width, VIEWS)
    if rest or not step:
        raise ValueError(
            f"{strip.image!s} is {width}x{height} pixels, so it is no strip of {VIEWS} equally "
            "wide views; replace the file, or take it out of the data."
        )
    shown = _shown(strip, step, for_census=for_census)
    return [
        replace(
            strip,
            mask=strip.mask if shown[view] or not strip.anomalous else None,
            anomalous=shown[view],
            defect=strip.defect if shown[view] else "good",
            view=str(view),
            crop=(view * step, 0, (view + 1) * step, height),
            key=f"{strip.key}#{view}",
        )
        for view in range(VIEWS)
    ]


def _shown(strip: Record, step: int, *, for_census: bool) -> list[bool]:
    """Which views show the defect of a strip."""
    if not strip.anomalous or strip.mask is None:
        return [strip.anomalous] * VIEWS
    try:
        mask = read_mask(strip, None)
    except ValueError:
        if for_census:  # which opens it again and says why
            return [True] * VIEWS
        raise
    shown = [bool(np.any(mask[:, view * step : (view + 1) * step])) for view in range(VIEWS)]
    return shown if any(shown) else [True] * VIEWS
