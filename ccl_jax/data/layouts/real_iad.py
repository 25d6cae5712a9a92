"""Real-IAD: five views of each part, listed in one JSON file per class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ccl_jax.data.layouts.folders import Split, Tree, choose_classes
from ccl_jax.data.layouts.metadata import (
    Entry,
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

    The root holds the class folders (`realiad_512`, say). The lists lie beside them or in one of
    `PLACES`; `splits`, relative to the root, names another folder, as that of the single-view
    lists. `{"train": [...], "test": [...]}` hold `anomaly_class` ("OK" is normal, else the code of
    the defect), `image_path` and `mask_path` (null: none), relative to the class folder.

    `sample` is the folder of the part (`NG/BX/S0012`), `view` the C1 .. C5 in the file name. A view
    of a defective part may be normal. Classes are sorted by name.

    Raises:
        ValueError: A class without list or folder, a list that is damaged or names what is not
            there, an absolute path or one that leads out of the root.
    """
    folder = _lists(tree, splits)
    found = _classes(tree, folder)
    names = choose_classes(found, classes, f"neither {tree.root} nor {folder} has such a class")
    _check_complete(tree, folder, names)
    entries = (entry for name in names for entry in _entries(tree, folder / f"{name}.json"))
    return read_entries(tree, entries, names, dataset=dataset, source=folder)


def _lists(tree: Tree, splits: str) -> Path:
    """The folder with the JSON files."""
    if splits:
        return Path(os.path.normpath(tree.root / splits))
    for place in PLACES:
        folder = Path(os.path.normpath(tree.root / place))
        if any(folder.glob("*.json")):
            return folder
    inner = [folder for folder in tree.folders(tree.root) if folder.name.startswith("realiad_")]
    images = [folder for folder in inner if "json" not in folder.name]
    if images:
        raise ValueError(
            f"{tree.root} is the folder above the images; name that with the class folders: "
            f"--config.data.root={images[0]}."
        )
    raise ValueError(
        f"{tree.root} has no <class>.json, nor do {', '.join(PLACES[1:])} beside it; unpack "
        "realiad_jsons.zip there, or name the folder of the lists: --config.data.splits=FOLDER."
    )


def _classes(tree: Tree, folder: Path) -> set[str]:
    folders = {path.name for path in tree.folders(tree.root)}
    lists = {path.stem for path in folder.glob("*.json") if not path.name.startswith(".")}
    return {name for name in folders | lists if not name.startswith("realiad_")}


def _check_complete(tree: Tree, folder: Path, names: Sequence[str]) -> None:
    """Raises ValueError where a class lacks its folder or its list."""
    unlisted = [name for name in names if not (folder / f"{name}.json").is_file()]
    absent = [name for name in names if not (tree.root / name).is_dir()]
    if unlisted or absent:
        usable = tuple(name for name in names if name not in {*unlisted, *absent})
        without = f'; or choose: --config.data.classes="{usable}"' if usable else ""
        what = [f"no {folder}/<class>.json for {', '.join(unlisted)}"] if unlisted else []
        what += [f"no {tree.root}/<class> for {', '.join(absent)}"] if absent else []
        raise ValueError(f"There is {' and '.join(what)}; unpack them there{without}.")


def _entries(tree: Tree, path: Path) -> Iterator[Entry]:
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
                class_name=path.stem,
                base=tree.root / path.stem,
                image=image,
                mask=optional_text_of(item, "mask_path", where),
                defect="good" if defect == NORMAL else defect,
                sample=folder,
                view=view[1] if view else "",
            )
