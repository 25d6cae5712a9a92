"""Folders as published or as a user keeps them, read into sorted records; no picture is opened."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ccl_jax.data.records import Record

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_ENDING = "_mask"


class Split(NamedTuple):
    """What to train on, what to test on, and the class that each label stands for."""

    train: list[Record]
    test: list[Record]
    class_names: list[str]


def read_mvtec(root: Path, *, dataset: str = "", classes: Sequence[str] = ()) -> Split:
    """Records of a folder in the MVTec AD layout, the same list on every machine.

    `<class>/train/good/*` is required; `<class>/test/good/*`, `<class>/test/<defect>/*` and
    `<class>/ground_truth/<defect>/<stem>_mask.png` are read as far as they are there. Classes
    are sorted by name and numbered from 0; `classes` chooses some, () takes all. `dataset` names
    the set in results, "" takes the folder's name. Files that are hidden or do not end like an
    image (in any case: png jpg jpeg bmp tif tiff webp) are passed over, and so is
    `ground_truth/good`: a normal image has no defective pixel.

    Raises:
        ValueError: The folder or a class in it does not have this layout; the text names the
            folder or file and the repair.
    """
    root = Path(os.path.abspath(root))  # resolve() would name the target of a link
    folders = _class_folders(root, classes)
    dataset = dataset or root.name
    train: list[Record] = []
    test: list[Record] = []
    for label, folder in enumerate(folders):
        train += [
            _record(image, folder, dataset, label, "good")
            for image in _images(folder / "train/good")
        ]
        test += _test_records(folder, dataset, label)
    return Split(train, test, [folder.name for folder in folders])


def plain_images(path: Path) -> list[Path]:
    """The image itself, or all images in the folder and below, sorted.

    Raises:
        ValueError: Nothing there, or a folder without an image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; name an image or a folder of images, "
            "e.g. --config.predict.input=photos."
        )
    found = [
        file
        for file in sorted(path.rglob("*"))
        if _is_image(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise ValueError(
            f"{path} and the folders in it hold no image; names must end in "
            f"{', '.join(EXTENSIONS)}."
        )
    return found


def _class_folders(root: Path, classes: Sequence[str]) -> list[Path]:
    """The chosen class folders, sorted, each with training images."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"The data folder {root} {what}; name the folder that holds one folder per class: "
            "--config.data.root=/path/to/photos."
        )
    if (root / "train" / "good").is_dir():
        raise ValueError(
            f"{root} is itself a class folder (it has train/good); name the folder above it: "
            f"--config.data.root={root.parent} --config.data.classes=\"('{root.name}',)\"."
        )
    found = {folder.name: folder for folder in _folders(root)}
    if not found:
        raise ValueError(
            f"{root} holds no class folders; put normal photos in {root}/<class>/train/good."
        )
    for name in classes:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(
                f"config.data.classes names '{name}', but {root} has no such folder; {hint}"
                f"there are: {', '.join(found)}."
            )
    chosen = [folder for name, folder in found.items() if not classes or name in classes]
    _check_training_images(chosen)
    return chosen


def _check_training_images(folders: Sequence[Path]) -> None:
    empty = [folder for folder in folders if not _images(folder / "train" / "good")]
    if empty:
        usable = tuple(folder.name for folder in folders if folder not in empty)
        without = f', or leave them out: --config.data.classes="{usable}"' if usable else ""
        raise ValueError(
            f"{len(empty)} of {len(folders)} classes have no training images: "
            f"{', '.join(folder.name for folder in empty)}; put normal photos in "
            f"{empty[0]}/train/good{without}."
        )


def _test_records(folder: Path, dataset: str, label: int) -> list[Record]:
    """Normal and anomalous test images of one class, the anomalous ones with their masks."""
    _check_none_loose(folder / "test")
    masks = _masks(folder / "ground_truth")
    records = []
    for kind in _folders(folder / "test"):
        for image in _images(kind):
            mask = masks.pop((kind.name, image.stem), None)
            records.append(_record(image, folder, dataset, label, kind.name, mask))
    if masks:
        (defect, stem), mask = next(iter(masks.items()))
        raise ValueError(
            f"{len(masks)} masks in {folder} have no image, the first is {mask}; there is no "
            f"{folder}/test/{defect}/{stem}.*: add that image, or delete the mask."
        )
    unmasked = [record for record in records if record.anomalous and record.mask is None]
    masked = sum(record.mask is not None for record in records)
    if unmasked and masked:
        defect = unmasked[0].defect
        raise ValueError(
            f"{len(unmasked)} anomalous images in {folder} have no mask while {masked} have one, "
            f"the first is {unmasked[0].image!s}; add {folder}/ground_truth/{defect}/"
            f"<stem>{MASK_ENDING}.png, or move {folder}/ground_truth away to do without masks in "
            "this class."
        )
    return records


def _masks(folder: Path) -> dict[tuple[str, str], Path]:
    """Masks below `ground_truth`, by kind of defect and stem of the image they belong to."""
    _check_none_loose(folder)
    masks: dict[tuple[str, str], Path] = {}
    for kind in _folders(folder):
        for mask in _images(kind) if kind.name != "good" else ():
            stem = mask.stem.removesuffix(MASK_ENDING)
            if stem == mask.stem:
                raise ValueError(
                    f"{mask} is not named like a mask; rename it to {stem}{MASK_ENDING}"
                    f"{mask.suffix}, after the image {stem} it belongs to."
                )
            if (kind.name, stem) in masks:
                raise ValueError(
                    f"{mask} and {masks[kind.name, stem].name} belong to one image; delete one."
                )
            masks[kind.name, stem] = mask
    return masks


def _check_none_loose(folder: Path) -> None:
    loose = _images(folder)
    if loose:
        raise ValueError(
            f"{len(loose)} images lie in {folder} itself, the first is {loose[0].name}; move each "
            f"into a folder below it, named after the kind of defect (or good): {folder}/<defect>."
        )


def _record(
    image: Path, folder: Path, dataset: str, label: int, kind: str, mask: Path | None = None
) -> Record:
    return Record(
        image=image,
        mask=mask,
        dataset=dataset,
        class_name=folder.name,
        label=label,
        anomalous=kind != "good",
        defect=kind,
        key=f"{dataset}/{image.relative_to(folder.parent).as_posix()}",
    )


def _images(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted; none where there is no folder."""
    return sorted(file for file in _visible(folder) if _is_image(file))


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in _visible(folder) if entry.is_dir())


def _visible(folder: Path) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return [entry for entry in entries if not entry.name.startswith(".")]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and file.is_file()
