"""VisA, as published with its table of splits, or converted to folders of one class each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ccl_jax.data.layouts.by_class import read_class_folders
from ccl_jax.data.layouts.folders import Split, Tree, choose_classes
from ccl_jax.data.layouts.metadata import Entry, class_name_of, read_entries, read_table

COLUMNS = ("object", "split", "label", "image", "mask")
TABLE = "split_csv/1cls.csv"
PARTS = {"train": True, "test": False}
DEFECTS = {"normal": "good", "anomaly": "bad"}  # as the converted form calls them


def read_visa(tree: Tree, *, dataset: str, classes: Sequence[str] = (), splits: str = "") -> Split:
    """Records of the table `split_csv/1cls.csv`, or of the folders that were made from it.

    As published: `<class>/Data/Images/{Normal,Anomaly}/*.JPG`, masks of small integers in
    `<class>/Data/Masks/Anomaly`, and a table with the columns `object,split,label,image,mask`;
    `splits`, relative to the root, names another table. Converted, in the root or its folder
    `1cls`: `<class>/{train/good, test/good, test/bad, ground_truth/bad}`.

    Raises:
        ValueError: Neither form, a table that is damaged or names what is not there, an absolute
            path or one that leads out of the root, a class without training images.
    """
    base = base_of(tree)
    if base is not None and not splits:
        return read_class_folders(tree, base, dataset=dataset, classes=classes)
    table = tree.root / (splits or TABLE)
    if not table.is_file():
        raise ValueError(
            f"{table} does not exist, and {tree.root} has no <class>/train/good; name the folder "
            "that VisA was unpacked to. The table is also at "
            "https://github.com/amazon-science/spot-diff/tree/main/split_csv."
        )
    entries = list(_entries(table, tree.root))
    found = {entry.class_name for entry in entries}
    names = choose_classes(found, classes, f"{table} has no such object")
    return read_entries(tree, entries, names, dataset=dataset, source=table)


def base_of(tree: Tree) -> Path | None:
    """The folder that holds the converted class folders, if there are any."""
    for base in (tree.root / "1cls", tree.root):
        if any((folder / "train" / "good").is_dir() for folder in tree.folders(base)):
            return base
    return None


def _entries(table: Path, root: Path) -> Iterator[Entry]:
    for where, row in read_table(table, COLUMNS):
        for column, known in (("split", PARTS), ("label", DEFECTS)):
            if row[column] not in known:
                raise ValueError(
                    f"{where} has {column}={row[column]!r}; write {' or '.join(known)}."
                )
        yield Entry(
            where=where,
            train=PARTS[row["split"]],
            class_name=class_name_of(row["object"], where),
            base=root,
            image=row["image"],
            mask=row["mask"],
            defect=DEFECTS[row["label"]],
        )
