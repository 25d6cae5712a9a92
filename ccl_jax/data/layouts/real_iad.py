"""Real-IAD: five views of each part, listed in one JSON file per class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ccl_jax.data.layouts.folders import Split, Tree, choose_classes
from ccl_jax.data.layouts.metadata import (
    Entry,
    class_name_of,
    list_in,
    optional_text_of,
    read_entries,
    read_json,
    text_of,
)

# Where releases and derived forms put the lists, seen from the folder of the class folders.
PLACES = (".", "realiad_jsons", "../realiad_jsons", "../realiad_jsons/realiad_jsons")
NORMAL = "OK"
PARTS = {"train": True, "test": False}
_VIEW = re.compile(r"_(C\d+)_")


def read_real_iad(
    tree: Tree, *, dataset: str, classes: Sequence[str] = (), splits: str = ""
) -> Split:
    """Records of what `<class>.json` lists; no path is ever composed from names.

    The root holds the class folders (`realiad_512`, say). The lists lie in the first of `PLACES`
    that has one of a class folder; lists without a folder are passed over, unless `classes` names
    them, and `left_aside` tells of them. `splits`, relative to the root, names another folder, as
    that of the single-view lists. `{"train": [...], "test": [...]}` hold `anomaly_class` ("OK" is
    normal, else the code of the defect), `image_path` and `mask_path` (null: none), relative to the
    class folder.

    `sample` is the folder of the part (`NG/BX/S0012`), `view` the C1 .. C5 in the file name. A view
    of a defective part may be normal. Classes are sorted by name.

    Raises:
        ValueError: A class without list or folder, a list that is damaged or names what is not
            there, an absolute path or one that leads out of the root.
    """
    folder = _folder_of_lists(tree, splits)
    folders, lists = _class_folders(tree), _lists_in(folder)
    found = {*folders, *(lists if classes else ())}
    names = choose_classes(found, classes, f"neither {tree.root} nor {folder} has such a class")
    _check_complete(tree, folder, names)
    entries = (entry for name in names for entry in _entries(name, folders[name], lists[name]))
    return read_entries(tree, entries, names, dataset=dataset, source=folder)


def left_aside(tree: Tree, splits: str = "") -> list[str]:
    """What `read_real_iad` does not read, a sentence each."""
    folder = _folder_of_lists(tree, splits)
    alone = sorted(_lists_in(folder).keys() - _class_folders(tree).keys())
    if not alone:
        return []
    listed = ", ".join(f"{name}.json" for name in alone)
    return [f"{len(alone)} lists in {folder} have no class folder in {tree.root}: {listed}"]


def _folder_of_lists(tree: Tree, splits: str) -> Path:
    """The folder with the JSON files."""
    if splits and _class_folders(tree):
        return Path(os.path.normpath(tree.root / splits))
    for place in PLACES:
        folder = Path(os.path.normpath(tree.root / place))
        if _lists_in(folder).keys() & _class_folders(tree).keys():
            return folder
    inner = [folder for folder in tree.folders(tree.root) if folder.name.startswith("realiad_")]
    images = [folder for folder in inner if "json" not in folder.name]
    if images:
        raise ValueError(
            f"{tree.root} is the folder above the images; name that with the class folders: "
            f"--config.data.root={images[0]}."
        )
    raise ValueError(
        f"{tree.root} has no <class>.json of a class folder in it, nor do {', '.join(PLACES[1:])} "
        "beside it; unpack realiad_jsons.zip there, or name the folder of the lists: "
        "--config.data.splits=FOLDER."
    )


def _class_folders(tree: Tree) -> dict[str, Path]:
    found = [path for path in tree.folders(tree.root) if not path.name.startswith("realiad_")]
    return {class_name_of(path.name, str(tree.root)): path for path in found}


def _lists_in(folder: Path) -> dict[str, Path]:
    found = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
    return {class_name_of(path.stem, str(folder)): path for path in found}


def _check_complete(tree: Tree, folder: Path, names: Sequence[str]) -> None:
    """Raises ValueError where a class lacks its folder or its list."""
    lists, folders = _lists_in(folder), _class_folders(tree)
    unlisted = [name for name in names if name not in lists]
    absent = [name for name in names if name not in folders]
    if unlisted or absent:
        usable = tuple(name for name in names if name not in {*unlisted, *absent})
        without = f'; or choose: --config.data.classes="{usable}"' if usable else ""
        what = [f"no {folder}/<class>.json for {', '.join(unlisted)}"] if unlisted else []
        what += [f"no {tree.root}/<class> for {', '.join(absent)}"] if absent else []
        raise ValueError(f"There is {' and '.join(what)}; unpack them there{without}.")


def _entries(class_name: str, base: Path, path: Path) -> Iterator[Entry]:
    content = read_json(path)
    for part, train in PARTS.items():
        for number, item in enumerate(list_in(content, part, path), 1):
            where = f"{path}, {part} entry {number},"
            image = text_of(item, "image_path", where)
            folder, _, name = image.rpartition("/")
            view = _VIEW.search(name)
            defect = text_of(item, "anomaly_class", where)
            yield Entry(
                where=where,
                train=train,
                class_name=class_name,
                base=base,
                image=image,
                mask=optional_text_of(item, "mask_path", where),
                defect="good" if defect == NORMAL else defect,
                sample=folder,
                view=view[1] if view else "",
            )
