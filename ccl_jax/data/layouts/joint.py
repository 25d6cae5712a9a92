"""Several data sets as one: a class is the pair of data set and name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ccl_jax.data.layouts.folders import Split
from ccl_jax.data.layouts.reader import choose_views, read_split
from ccl_jax.data.records import Record


class Part(NamedTuple):
    """One data set of a joint one; see `read_split`."""

    layout: str
    root: Path
    classes: Sequence[str] = ()
    splits: str = ""


def read_joint(
    parts: Mapping[str, Part],
    *,
    views: Sequence[str] = (),
    validation: str = "leave",
    follow_links: bool = False,
    for_census: bool = False,
) -> Split:
    """The records of all parts, each data set named by its key, in the order of these names.

    Equal class names of two data sets stay two classes. `views` chooses among the records that
    have one.

    Raises:
        ValueError: As `read_split`, naming the part and its settings.
    """
    train: list[Record] = []
    test: list[Record] = []
    class_names: list[str] = []
    for name in sorted(parts):
        part = parts[name]
        try:
            split = read_split(
                part.root,
                layout=part.layout,
                dataset=name,
                classes=part.classes,
                splits=part.splits,
                validation=validation,
                follow_links=follow_links,
                for_census=for_census,
            )
        except ValueError as error:
            raise ValueError(f"In the part {name!r}: {_for_part(str(error), name)}") from error
        first = len(class_names)
        train += [replace(record, label=first + record.label) for record in split.train]
        test += [replace(record, label=first + record.label) for record in split.test]
        class_names += split.class_names
    return choose_views(Split(train, test, class_names), views)


def _for_part(text: str, name: str) -> str:
    """The text with the settings of the part in place of those of a single data set."""
    return re.sub(
        r"config\.data\.(layout|root|classes|splits)\b", rf"config.data.parts.{name}.\1", text
    )
