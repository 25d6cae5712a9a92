"""BTAD: folders of one class each, where normal is `ok` and file types differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccl_jax.data.layouts.by_class import Names, read_class_folders
from ccl_jax.data.layouts.folders import Split, Tree

FOLDER = "BTech_Dataset_transformed"  # of the published archive
NAMES = Names(normal="ok")


def read_btad(tree: Tree, *, dataset: str, classes: Sequence[str] = ()) -> Split:
    """Records of `{01,02,03}/{train/ok, test/ok, test/ko, ground_truth/ko}`.

    The root is the folder `BTech_Dataset_transformed`, or the one that it lies in. Images are .bmp
    or .png, masks either, whatever their images are: they go together by name. Raises ValueError
    as `read_class_folders`.
    """
    return read_class_folders(tree, base_of(tree), NAMES, dataset=dataset, classes=classes)


def base_of(tree: Tree) -> Path:
    """The folder of the class folders: the root, or the one in it that the archive adds."""
    inner = tree.root / FOLDER
    return inner if inner in tree.folders(tree.root) else tree.root
