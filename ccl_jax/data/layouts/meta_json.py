"""Any folder described by one `meta.json`, as ADer and the code built on it write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ccl_jax.data.layouts.folders import Split, Tree, choose_classes, composed
from ccl_jax.data.layouts.metadata import (
    Entry,
    class_name_of,
    optional_text_of,
    read_entries,
    read_json,
    text_of,
)

PARTS = {"train": True, "test": False}
UNNAMED = "bad"  # kind of defect where the file names none


def read_meta_json(
    tree: Tree, *, dataset: str, classes: Sequence[str] = (), splits: str = ""
) -> Split:
    """Records of `{"train": {class: [entry, ...]}, "test": {...}}`.

    An entry has `img_path` and `mask_path` ("": none), relative to the root, `anomaly` (0 or 1) and
    `specie_name`, the kind of defect. `splits`, relative to the root, names another file than
    `meta.json`. Classes are sorted by name: the order in the file does not count.

    Raises:
        ValueError: A file that is damaged or names what is not there, an absolute path or one that
            leads out of the root, a class without training images.
    """
    path = tree.root / (splits or "meta.json")
    content = read_json(path)
    for part in PARTS:
        if not isinstance(content, Mapping) or not isinstance(content.get(part), Mapping):
            strips = isinstance(content, Mapping) and "test-pixel" in content
            hint = "; read five-view strips with --config.data.layout=manta" if strips else ""
            raise ValueError(f"{path} has no object {part!r} of classes{hint}.")
    found = {class_name_of(name, f"{path}, {part},") for part in PARTS for name in content[part]}
    names = choose_classes(found, classes, f"{path} has no such class")
    entries = _entries(content, path, tree.root)
    return read_entries(tree, entries, names, dataset=dataset, source=path)


def _entries(content: Mapping, path: Path, root: Path) -> Iterator[Entry]:
    for part, train in PARTS.items():
        for name, items in content[part].items():
            if not isinstance(items, list):
                raise ValueError(f"{path}, {part} of {name}, is no list; correct the file.")
            for number, item in enumerate(items, 1):
                where = f"{path}, {part} of {name}, entry {number},"
                image = text_of(item, "img_path", where)
                anomaly = item.get("anomaly")
                if anomaly not in (0, 1):
                    raise ValueError(
                        f"{where} has anomaly={anomaly!r}; write 0 for normal, 1 for anomalous."
                    )
                defect = optional_text_of(item, "specie_name", where)
                defect = UNNAMED if defect in ("", "good") else defect
                yield Entry(
                    where=where,
                    train=train,
                    class_name=composed(name),
                    base=root,
                    image=image,
                    mask=optional_text_of(item, "mask_path", where),
                    defect=defect if anomaly else "good",
                )
