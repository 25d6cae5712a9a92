"""The one entry to all layouts: a folder and the name of its layout become a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccl_jax.data.layouts import btad, by_class, mvtec2, real_iad, visa
from ccl_jax.data.layouts.btad import read_btad
from ccl_jax.data.layouts.by_class import read_class_folders
from ccl_jax.data.layouts.folders import Split, Tree
from ccl_jax.data.layouts.manta import read_manta
from ccl_jax.data.layouts.meta_json import read_meta_json
from ccl_jax.data.layouts.real_iad import read_real_iad
from ccl_jax.data.layouts.visa import read_visa

LAYOUTS = ("mvtec", "mvtec2", "visa", "btad", "real_iad", "manta", "meta")
WITH_SPLITS = ("visa", "real_iad", "meta")  # layouts whose lists may lie elsewhere
VALIDATION = ("leave", "train")


def read_split(
    root: Path,
    *,
    layout: str,
    dataset: str = "",
    classes: Sequence[str] = (),
    splits: str = "",
    views: Sequence[str] = (),
    validation: str = "leave",
    follow_links: bool = False,
    for_census: bool = False,
) -> Split:
    """Records of a data set, sorted, the same list on every machine; pictures stay closed.

    Only "manta" opens any: see `read_manta`. `dataset` names the set in results, "" takes the
    folder's name; `classes` and `views` choose some, () takes all; `splits` is the file or folder
    of the lists where that is not the published one; `validation` counts for "mvtec2", and
    `follow_links` and `for_census` are those of `Tree`.

    Raises:
        ValueError: An unknown layout, or a folder that does not have the layout; the text names
            the setting, folder or file, and the repair.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"config.data.layout={layout!r} is unknown; use one of {', '.join(LAYOUTS)}."
        )
    if splits and layout not in WITH_SPLITS:
        raise ValueError(
            f"config.data.splits={splits!r} has no meaning for config.data.layout={layout}, whose "
            "folders say it all; leave it empty: --config.data.splits=''."
        )
    tree = Tree(root, follow_links=follow_links, for_census=for_census)
    dataset = dataset or tree.root.name
    return choose_views(_read(tree, layout, dataset, classes, splits, validation), views)


def read_mvtec(root: Path, *, dataset: str = "", classes: Sequence[str] = ()) -> Split:
    """Records of a folder in the MVTec AD layout: see `read_class_folders`, which may raise."""
    return read_split(root, layout="mvtec", dataset=dataset, classes=classes)


def left_aside(
    root: Path,
    *,
    layout: str,
    classes: Sequence[str] = (),
    splits: str = "",
    validation: str = "leave",
    follow_links: bool = False,
) -> list[str]:
    """What `read_split` does not read of a data set that it can read, a sentence each."""
    tree = Tree(root, follow_links=follow_links)
    match layout:
        case "mvtec":
            return by_class.left_aside(tree, tree.root, classes=classes)
        case "mvtec2":
            return mvtec2.left_aside(tree, classes, validation)
        case "btad":
            return by_class.left_aside(tree, btad.base_of(tree), btad.NAMES, classes=classes)
        case "visa":
            base = None if splits else visa.base_of(tree)
            return by_class.left_aside(tree, base, classes=classes) if base else []
        case "real_iad":
            return real_iad.left_aside(tree, splits)
        case _:
            return []


def choose_views(split: Split, views: Sequence[str]) -> Split:
    """Only the records of some views, and those that have none; () takes all.

    Raises:
        ValueError: No record has one of the views, or a class has training images in others only.
    """
    if not views:
        return split
    found = sorted({r.view for part in (split.train, split.test) for r in part if r.view})
    unknown = [view for view in views if view not in found]
    if unknown:
        there = f"it has {', '.join(found)}" if found else "no image of it belongs to a view"
        raise ValueError(
            f"config.data.views names {', '.join(map(repr, unknown))}, which the data does not "
            f"have; {there}."
        )
    chosen = {"", *views}
    train, test = (
        [record for record in part if record.view in chosen] for part in (split.train, split.test)
    )
    trained = {record.label for record in train}
    lost = [label for label in range(len(split.class_names)) if label not in trained]
    if lost:
        theirs = sorted({record.view for record in split.train if record.label in lost})
        raise ValueError(
            f"config.data.views={tuple(views)} leaves {len(lost)} of {len(split.class_names)} "
            f"classes without training images: "
            f"{', '.join(split.class_names[label] for label in lost)}; theirs are of the views "
            f"{', '.join(theirs)}, so add some of these, or leave the classes out."
        )
    return split._replace(train=train, test=test)


def _read(
    tree: Tree,
    layout: str,
    dataset: str,
    classes: Sequence[str],
    splits: str,
    validation: str,
) -> Split:
    match layout:
        case "mvtec":
            return read_class_folders(tree, tree.root, dataset=dataset, classes=classes)
        case "mvtec2":
            return mvtec2.read_mvtec2(tree, dataset=dataset, classes=classes, validation=validation)
        case "btad":
            return read_btad(tree, dataset=dataset, classes=classes)
        case "manta":
            return read_manta(tree, dataset=dataset, classes=classes)
        case "visa":
            return read_visa(tree, dataset=dataset, classes=classes, splits=splits)
        case "real_iad":
            return read_real_iad(tree, dataset=dataset, classes=classes, splits=splits)
        case _:
            return read_meta_json(tree, dataset=dataset, classes=classes, splits=splits)
