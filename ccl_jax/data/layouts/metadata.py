"""Data sets whose files are named by JSON or CSV: entries become records once all is found."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccl_jax.data.layouts.folders import Split, Tree, composed, key_of
from ccl_jax.data.records import Record, class_of


class Entry(NamedTuple):
    """What metadata say of one image; nothing has been looked up yet."""

    where: str  # of which file which entry, for errors
    train: bool
    class_name: str
    base: Path  # folder that the paths are relative to
    image: str
    mask: str = ""  # "": none
    defect: str = "good"
    sample: str = ""
    view: str = ""


def read_entries(
    tree: Tree, entries: Iterable[Entry], names: Sequence[str], *, dataset: str, source: Path
) -> Split:
    """Records of the entries of the classes `names`, by class, then by path within the root.

    A mask counts for anomalous images only, unless `tree` is for a census. `source` is the file or
    folder of the metadata.

    Raises:
        ValueError: A file that is not there, an absolute path or one that leads out of the root,
            a class without training images, or with masks for some anomalous images only.
    """
    labels = {name: label for label, name in enumerate(names)}
    found: dict[bool, list[Record]] = {True: [], False: []}
    missing, number = [], 0
    for entry in entries:
        if entry.class_name not in labels:
            continue
        number += 1
        anomalous = entry.defect != "good"
        image = tree.find(entry.base, entry.image, entry.where)
        mask = None
        if entry.mask and (anomalous or tree.for_census):
            mask = tree.find(entry.base, entry.mask, entry.where)
        if image is None or (anomalous and entry.mask and mask is None):
            lacking = entry.image if image is None else entry.mask
            missing.append(f"{entry.base / lacking} ({entry.where})")
            continue
        found[entry.train].append(
            Record(
                image=image,
                mask=mask,
                dataset=dataset,
                class_name=entry.class_name,
                label=labels[entry.class_name],
                anomalous=anomalous,
                defect=entry.defect,
                sample=entry.sample,
                view=entry.view,
                key=key_of(dataset, tree.root, image),
            )
        )
    if missing:
        raise ValueError(
            f"{len(missing)} of {number} images or masks that {source} lists are not there, the "
            f"first is {missing[0]}; unpack all of the data set, or take these entries out."
        )
    train, test = (sorted(found[part], key=lambda r: (r.label, r.key)) for part in (True, False))
    split = Split(train, test, [f"{dataset}/{name}" for name in names])
    _check_trained(split, names, source)
    if not tree.for_census:
        _check_masks(split, source)
    return split


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError, naming it, where it is none."""
    try:
        return json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no valid JSON ({error}); copy it again from its source."
        ) from error


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV file with a header, each with where it stands.

    Raises:
        ValueError: No such file, no table, a column that is missing, or a row that is too short.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"{path} is no valid table ({error}); copy it again from its source."
        ) from error
    lacking = [name for name in columns if name not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(
            f"{path} has no column {', '.join(lacking)}; its first line must be "
            f"{','.join(columns)}."
        )
    for line, row in rows:
        where = f"{path}, line {line},"
        if any(row[name] is None for name in columns):
            raise ValueError(f"{where} is too short; it needs {', '.join(columns)}.")
        yield where, {name: row[name] for name in columns}


def class_name_of(name: str, where: str) -> str:
    """A class as metadata name it, in composed characters; ValueError where it is no plain name."""
    if name.strip() in ("", ".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        raise ValueError(
            f"{where} names a class {name!r}; a class needs a name without slashes and control "
            "characters, as it becomes part of file names: rename it there."
        )
    return composed(name)


def text_of(entry: object, name: str, where: str) -> str:
    """A field of an entry that must be text; ValueError where it is not."""
    value = entry.get(name) if isinstance(entry, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"{where} has no text {name!r}: {_short(entry)}; correct the entry.")
    return value


def optional_text_of(entry: object, name: str, where: str) -> str:
    """As `text_of`; "" where the field is not there or null."""
    if isinstance(entry, Mapping) and entry.get(name) is None:
        return ""
    return text_of(entry, name, where)


def list_in(content: object, name: str, path: Path) -> list[Any]:
    """A list within an object of a JSON file; ValueError where there is none."""
    value = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(value, list):
        raise ValueError(f"{path} has no list {name!r}; copy it again from its source.")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(
            f"{path} cannot be read: {str(reason).lower()}; put the file of the data set there, or "
            "name another one: --config.data.splits=FILE."
        ) from error


def _check_trained(split: Split, names: Sequence[str], source: Path) -> None:
    trained = {record.class_name for record in split.train}
    untrained = [name for name in names if name not in trained]
    if untrained:
        usable = tuple(name for name in names if name in trained)
        without = f', or leave them out: --config.data.classes="{usable}"' if usable else ""
        raise ValueError(
            f"{len(untrained)} of {len(names)} classes in {source} have no training images: "
            f"{', '.join(untrained)}; add them{without}."
        )


def _check_masks(split: Split, source: Path) -> None:
    masked = {record.class_name for record in split.test if record.mask is not None}
    unmasked = [r for r in split.test if r.anomalous and r.mask is None and r.class_name in masked]
    if unmasked:
        raise ValueError(
            f"{len(unmasked)} anomalous images have no mask while others of their class have one, "
            f"the first is {unmasked[0].image!s} of {class_of(unmasked[0])}; name their masks in "
            f"{source}, or none in that class."
        )


def _short(entry: object) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
