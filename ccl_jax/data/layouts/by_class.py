"""One folder per class with train, test and ground truth: MVTec AD, its relatives, your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ccl_jax.data.layouts.folders import Split, Tree, choose_classes, composed, key_of
from ccl_jax.data.records import Record

MASK_ENDING = "_mask"


class Names(NamedTuple):
    """What the folders within a class are called."""

    train: tuple[str, ...] = ("train",)
    test: str = "test"
    masks: str = "ground_truth"
    normal: str = "good"


MVTEC = Names()


def read_class_folders(
    tree: Tree,
    base: Path,
    names: Names = MVTEC,
    *,
    dataset: str,
    classes: Sequence[str] = (),
) -> Split:
    """Records of the class folders in `base`, the same list on every machine.

    With the names of MVTec AD: `<class>/train/good/*` is required; `<class>/test/good/*`,
    `<class>/test/<defect>/*` and `<class>/ground_truth/<defect>/*` are read as far as they are
    there. A mask belongs to the image of its kind of defect with the same name, whatever the
    ending; where one mask of a class is named `<stem>_mask`, all must be. Classes are sorted by
    name and numbered from 0; `classes` chooses some, () takes all. `ground_truth/good` is passed
    over, as a normal image has no defective pixel, unless `tree` is for a census.

    Raises:
        ValueError: The folder or a class in it does not have this layout; the text names the
            folder or file and the repair.
    """
    folders = _class_folders(tree, base, names, classes)
    train: list[Record] = []
    test: list[Record] = []
    for label, folder in enumerate(folders):
        of_class = _Class(tree, folder, names, dataset, label)
        for part in names.train:
            images = tree.images(folder / part / names.normal)
            train += [of_class.record(image, names.normal) for image in images]
        test += _test_records(of_class)
    return Split(train, test, [f"{dataset}/{composed(folder.name)}" for folder in folders])


def left_aside(
    tree: Tree, base: Path, names: Names = MVTEC, *, classes: Sequence[str] = ()
) -> list[str]:
    """What `read_class_folders` finds in a class folder and does not read, in a sentence, if any.

    Images that lie beside, or below, the folders that it reads; links to folders are not followed.
    """
    wanted = {composed(name) for name in classes}
    found: list[Path] = []
    for folder in tree.folders(base):
        if wanted and composed(folder.name) not in wanted:
            continue
        for part in names.train:
            found += tree.images(folder / part)
            for kind in _inner(tree, folder / part):
                if kind.name != names.normal:
                    found += tree.images(kind)
                found += _images_below(tree, kind)
        for kind in _inner(tree, folder / names.test):
            if kind != folder / names.masks:
                found += _images_below(tree, kind)
    if not found:
        return []
    return [
        f"{len(found)} images lie where the layout has none and are not used, the first is "
        f"{found[0]}; move those that belong to it directly into <class>/{names.train[0]}/"
        f"{names.normal} or <class>/{names.test}/<defect>"
    ]


def _inner(tree: Tree, folder: Path) -> list[Path]:
    return [inner for inner in tree.folders(folder) if not inner.is_symlink()]


def _images_below(tree: Tree, folder: Path) -> list[Path]:
    """Images in the folders of a folder, not in itself."""
    found: list[Path] = []
    for inner in _inner(tree, folder):
        found += [*tree.images(inner), *_images_below(tree, inner)]
    return found


class _Class(NamedTuple):
    """One class folder and what its records have in common."""

    tree: Tree
    folder: Path
    names: Names
    dataset: str
    label: int

    def record(self, image: Path, kind: str, mask: Path | None = None) -> Record:
        """The record of an image in the folder of a kind of defect."""
        anomalous = kind != self.names.normal
        return Record(
            image=image,
            mask=mask,
            dataset=self.dataset,
            class_name=composed(self.folder.name),
            label=self.label,
            anomalous=anomalous,
            defect=kind if anomalous else "good",
            key=key_of(self.dataset, self.folder.parent, image),
        )


def _class_folders(tree: Tree, base: Path, names: Names, classes: Sequence[str]) -> list[Path]:
    """The chosen class folders, sorted, each with training images."""
    where = f"train/{names.normal}"
    if (base / where).is_dir():
        raise ValueError(
            f"{base} is itself a class folder (it has {where}); name the folder above it: "
            f"--config.data.root={base.parent} --config.data.classes=\"('{base.name}',)\"."
        )
    found = {composed(folder.name): folder for folder in tree.folders(base)}
    if not found:
        raise ValueError(
            f"{base} holds no class folders; put normal photos in {base}/<class>/{where}."
        )
    chosen = choose_classes(found, classes, f"{base} has no such folder")
    folders = [found[name] for name in chosen]
    check_training_images(tree, folders, where)
    return folders


def check_training_images(tree: Tree, folders: Sequence[Path], where: str) -> None:
    """Raises ValueError, with a way out, where class folders have no images in `where`."""
    empty = [folder for folder in folders if not tree.images(folder / where)]
    if empty:
        usable = tuple(folder.name for folder in folders if folder not in empty)
        without = f', or leave them out: --config.data.classes="{usable}"' if usable else ""
        raise ValueError(
            f"{len(empty)} of {len(folders)} classes have no training images: "
            f"{', '.join(folder.name for folder in empty)}; put normal photos in "
            f"{empty[0]}/{where}{without}."
        )


def _test_records(of_class: _Class) -> list[Record]:
    """Normal and anomalous test images of one class, the anomalous ones with their masks."""
    tree, folder, names = of_class.tree, of_class.folder, of_class.names
    _check_none_loose(tree, folder / names.test)
    masks = _masks(of_class)
    of_normal = _masks_of_normal(of_class) if tree.for_census else {}
    records = []
    for kind in tree.folders(folder / names.test):
        if kind == folder / names.masks:
            continue
        for image in tree.images(kind):
            stem = composed(image.stem)
            mask = masks.pop((composed(kind.name), stem), None)
            if kind.name == names.normal:
                mask = of_normal.get(stem + MASK_ENDING) or of_normal.get(stem)
            records.append(of_class.record(image, composed(kind.name), mask))
    if masks:
        (defect, stem), mask = next(iter(masks.items()))
        raise ValueError(
            f"{len(masks)} masks in {folder} have no image, the first is {mask}; there is no "
            f"{folder}/{names.test}/{defect}/{stem}.*: add that image, or delete the mask."
        )
    unmasked = [record for record in records if record.anomalous and record.mask is None]
    masked = sum(record.mask is not None for record in records)
    if unmasked and masked and not tree.for_census:
        defect = unmasked[0].defect
        raise ValueError(
            f"{len(unmasked)} anomalous images in {folder} have no mask while {masked} have one, "
            f"the first is {unmasked[0].image!s}; add {folder}/{names.masks}/{defect}/"
            f"<stem>{MASK_ENDING}.png, or move {folder}/{names.masks} away to do without masks in "
            "this class."
        )
    return records


def _masks(of_class: _Class) -> dict[tuple[str, str], Path]:
    """Masks of a class, by kind of defect and stem of the image they belong to."""
    tree, folder = of_class.tree, of_class.folder / of_class.names.masks
    _check_none_loose(tree, folder)
    kinds = [kind for kind in tree.folders(folder) if kind.name != of_class.names.normal]
    files = [(kind, mask) for kind in kinds for mask in tree.images(kind)]
    marked = any(mask.stem.endswith(MASK_ENDING) for _, mask in files)
    masks: dict[tuple[str, str], Path] = {}
    for kind, mask in files:
        stem = mask.stem.removesuffix(MASK_ENDING) if marked else mask.stem
        if marked and stem == mask.stem:
            raise ValueError(
                f"{mask} is not named like a mask; rename it to {stem}{MASK_ENDING}"
                f"{mask.suffix}, after the image {stem} it belongs to."
            )
        key = (composed(kind.name), composed(stem))
        if key in masks:
            raise ValueError(f"{mask} and {masks[key].name} belong to one image; delete one.")
        masks[key] = mask
    return masks


def _masks_of_normal(of_class: _Class) -> dict[str, Path]:
    """What lies where masks of normal images would, by its name."""
    folder = of_class.folder / of_class.names.masks / of_class.names.normal
    return {composed(mask.stem): mask for mask in of_class.tree.images(folder)}


def _check_none_loose(tree: Tree, folder: Path) -> None:
    loose = tree.images(folder)
    if loose:
        raise ValueError(
            f"{len(loose)} images lie in {folder} itself, the first is {loose[0].name}; move each "
            f"into a folder below it, named after the kind of defect (or good): {folder}/<defect>."
        )
