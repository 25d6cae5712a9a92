"""MVTec AD 2: a validation split beside the training images, and tests without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccl_jax.data.layouts import by_class
from ccl_jax.data.layouts.by_class import Names, read_class_folders
from ccl_jax.data.layouts.folders import Split, Tree

PRIVATE = ("test_private", "test_private_mixed")


def read_mvtec2(
    tree: Tree, *, dataset: str, classes: Sequence[str] = (), validation: str = "leave"
) -> Split:
    """Records of `<class>/train/good` and `<class>/test_public/{good,bad,ground_truth/bad}`.

    `validation` says what becomes of `<class>/validation/good`: "leave" sets it aside, "train"
    trains on it too. `test_private*` have no labels and are never read; `left_aside` counts both.
    Raises ValueError as `read_class_folders`.
    """
    names = _names(validation)
    return read_class_folders(tree, tree.root, names, dataset=dataset, classes=classes)


def left_aside(tree: Tree, classes: Sequence[str], validation: str) -> list[str]:
    """What `read_mvtec2` does not read, a sentence each."""
    notes = by_class.left_aside(tree, tree.root, _names(validation), classes=classes)
    folders = [f for f in tree.folders(tree.root) if not classes or f.name in classes]
    kept = _count(tree, folders, "validation/good")
    if kept and validation == "leave":
        notes.append(
            f"{kept} validation images are set aside; --config.data.validation=train trains on them"
        )
    private = sum(_count(tree, folders, name) for name in PRIVATE)
    if private:
        notes.append(
            f"{private} images in {' and '.join(PRIVATE)} have no labels and are not used; "
            "https://benchmark.mvtec.com scores them"
        )
    return notes


def _names(validation: str) -> Names:
    return Names(
        train=("train", "validation") if validation == "train" else ("train",),
        test="test_public",
        masks="test_public/ground_truth",
    )


def _count(tree: Tree, folders: Sequence[Path], name: str) -> int:
    return sum(len(tree.images(folder / name)) for folder in folders)
