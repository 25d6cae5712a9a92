"""Records decoded and resized: kept in memory where a set fits, replaced where a file is bad."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from ccl_jax.data.records import (
    Record,
    StoreError,
    check_files,
    class_of,
    read_image,
    read_mask,
)

HOW_TO_SKIP = "To train without such files: --config.data.bad_files=skip."


class Pictures:
    """Images and masks of a set by index, in squares of `size` pixels.

    Each is read from its file every time; or once, and then taken from memory, where `keep`.
    Threads may share one object. Processes could not: each would fill a memory of its own.
    """

    def __init__(
        self, records: Sequence[Record], size: int, *, masks: bool = False, keep: bool = False
    ) -> None:
        self.records = list(records)
        self.size = size
        self.kept = keep
        square = (len(self.records), size, size)
        self._images = _Rows((*square, 3)) if keep else None
        self._masks = _Rows(square) if keep and masks else None

    def image(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        """What `read_image` returns for the record; not to be written to.

        Raises:
            ValueError: As `read_image`.
        """

        def read() -> np.ndarray:
            return read_image(self.records[index], self.size)

        return read() if self._images is None else self._images.get(index, read)

    def mask(self, index: int) -> UInt8[np.ndarray, "size size"]:
        """What `read_mask` returns for the record; not to be written to.

        Raises:
            ValueError: As `read_mask`.
        """

        def read() -> np.ndarray:
            return read_mask(self.records[index], self.size)

        return read() if self._masks is None else self._masks.get(index, read)


class _Rows:
    """Rows of an array that are computed when they are first asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = np.empty(shape, np.uint8)  # takes memory only as rows are written
        self._there = np.zeros(shape[0], bool)
        self._lock = threading.Lock()

    def get(self, index: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The row, from memory if it was computed before."""
        if not self._there[index]:
            row = compute()
            with self._lock:  # several threads may have computed it; nobody writes what is read
                if not self._there[index]:
                    self._rows[index] = row
                    self._there[index] = True
        return self._rows[index]


class DecodedCache:
    """Sets of pictures that stay in memory, together within a budget in bytes.

    First come, first served: a set that does not fit in what is left is not kept at all, because
    most of it would be read anew in every epoch.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.free = budget
        self._kept: dict[tuple[int, bool, tuple[str, ...]], Pictures] = {}

    def pictures(self, records: Sequence[Record], size: int, *, masks: bool = False) -> Pictures:
        """The pictures of these records, the same ones in every call where they are kept."""
        name = size, masks, tuple(record.key for record in records)
        if name not in self._kept:
            needed = decoded_bytes(len(records), size, masks=masks)
            if needed > self.free:
                return Pictures(records, size)
            self.free -= needed
            self._kept[name] = Pictures(records, size, masks=masks, keep=True)
        return self._kept[name]


def decoded_bytes(images: int, size: int, *, masks: bool = False) -> int:
    """Memory in bytes that so many images take, three channels and perhaps a mask each."""
    return images * size * size * (4 if masks else 3)


class TrainingImages:
    """Images to train on, and what is done about an unreadable one: "stop" there, or "skip" it.

    The image that stands in for a skipped one is the next of its class that can be read, in the
    order of the records and round again. So it depends on the index and on which files are bad.

    Raises:
        ValueError: `bad_files` is neither.
    """

    def __init__(self, pictures: Pictures, bad_files: str) -> None:
        if bad_files not in ("stop", "skip"):
            raise ValueError(
                f"config.data.bad_files={bad_files!r} is unknown; use --config.data.bad_files=stop "
                "or --config.data.bad_files=skip."
            )
        self._pictures = pictures
        self._skip = bad_files == "skip"
        self._next = _next_of_class([record.label for record in pictures.records])
        self._unreadable: dict[int, str] = {}  # index: reason; these are not tried again

    def image(self, index: int) -> tuple[np.ndarray, dict[int, str]]:
        """The image at `index` or its stand-in, and why which others cannot be read, by index.

        Raises:
            ValueError: A file cannot be read and is not to be skipped, or no file of a class can.
            StoreError: What holds the files is broken, so that a skip would pass over many.
        """
        passed: dict[int, str] = {}
        while index not in passed:
            if index not in self._unreadable:
                try:
                    return self._pictures.image(index), passed
                except StoreError:
                    raise
                except ValueError as error:
                    if not self._skip:
                        raise ValueError(f"{error} {HOW_TO_SKIP}") from error
                    self._unreadable[index] = str(error)
            passed[index] = self._unreadable[index]
            index = int(self._next[index])
        name = class_of(self._pictures.records[index])
        raise ValueError(
            f"none of the {len(passed)} training images of {name} can be read; the first: "
            f"{passed[index]} Or leave the class out with --config.data.classes."
        )


def check_pictures(train: Sequence[Record], test: Sequence[Record], *, bad_files: str) -> None:
    """Checks all files as `check_files`; those to train on only where a bad one is to "stop" it.

    One that is to be skipped is found when it is its turn.

    Raises:
        ValueError: As `check_files`, with the setting that skips where one could be skipped.
    """
    if bad_files == "stop":
        try:
            check_files(train)
        except StoreError:
            raise
        except ValueError as error:
            raise ValueError(f"{error} {HOW_TO_SKIP}") from error
    check_files(test)


def _next_of_class(labels: Sequence[int]) -> np.ndarray:
    """Index of the next record with the same label; the last one's is the first."""
    following = np.zeros(len(labels), np.int64)
    for label in set(labels):
        mine = np.flatnonzero(np.equal(labels, label))
        following[mine] = np.roll(mine, -1)
    return following
