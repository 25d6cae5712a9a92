"""Folders as published or as a user keeps them, read into sorted records.

`read_split` is the way in, `read_joint` for several data sets at once. A layout is a file here:
`folders` lists what is there, `by_class` reads folders per class, `metadata` what JSON or CSV name.
"""

from ccl_jax.data.layouts.folders import EXTENSIONS, Split, plain_images
from ccl_jax.data.layouts.joint import Part, read_joint
from ccl_jax.data.layouts.reader import (
    LAYOUTS,
    VALIDATION,
    left_aside,
    read_mvtec,
    read_split,
)
from ccl_jax.data.layouts.sources import SOURCES, Source, describe_source, source_of

__all__ = [
    "EXTENSIONS",
    "LAYOUTS",
    "SOURCES",
    "VALIDATION",
    "Part",
    "Source",
    "Split",
    "describe_source",
    "left_aside",
    "plain_images",
    "read_joint",
    "read_mvtec",
    "read_split",
    "source_of",
]
