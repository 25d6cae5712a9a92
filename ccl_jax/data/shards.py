"""Prepared data read back: records that know where in which shard their pictures lie."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from ccl_jax.data import examples, listings, manifest
from ccl_jax.data.layouts import Split
from ccl_jax.data.layouts.folders import choose_classes, composed
from ccl_jax.data.listings import Row
from ccl_jax.data.manifest import Manifest, Shard
from ccl_jax.data.records import Record, Stored, StoreError


class ShardReader:
    """A file of records, opened when it is first read, in every process anew; threads share it."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.file
        self._folder = folder
        self._shard = shard
        self._lock = threading.Lock()
        self._reader: Any = None

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, Shard]]:
        return ShardReader, (self._folder, self._shard)

    def read(self, position: int, part: str) -> bytes:
        """The encoded "image" or "mask" of a record.

        Raises:
            StoreError: The shard is gone, damaged, or no longer the one that was listed; the text
                names it and the repair.
        """
        try:
            (example,) = self._opened().read([position])
            return examples.bytes_of(example, part)
        except StoreError:
            raise
        except (RuntimeError, ValueError) as error:
            raise StoreError(
                f"record {position} of {self.path} cannot be read ({error}). "
                f"{repair(self.path.parent)}"
            ) from error

    def _opened(self) -> Any:
        with self._lock:
            if self._reader is None:
                self._reader = self._open()
            return self._reader

    def _open(self) -> Any:
        try:
            now = listings.read(self._folder / self._shard.listing).shard
        except ValueError as error:
            raise StoreError(f"{error} {repair(self._folder)}") from error
        if now.sha256 != self._shard.sha256:  # sizes are multiples of 64 KiB, and say less
            raise StoreError(
                f"{self.path} was prepared anew since this process began; start it again, so that "
                "all images are of one preparation."
            )
        if reason := manifest.damage(self._folder, now, full=False):
            raise StoreError(f"{reason}. {repair(self._folder)}")
        return array_record_module.ArrayRecordReader(str(self.path), manifest.READING)


@dataclass(frozen=True, slots=True)
class Picture(Stored):
    """The image or the mask of one record of a shard."""

    shard: ShardReader
    position: int
    part: str

    def read(self) -> bytes:
        """The encoded bytes; StoreError where the shard is gone or damaged."""
        return self.shard.read(self.position, self.part)


def repair(folder: Path) -> str:
    """The sentence that says how to repair prepared data."""
    return (
        "Write what is damaged again, with the --config and --config.data.root of the images: "
        f"python -m ccl_jax.main --config CONFIG {manifest.command_for(folder)} (in a local "
        "copy of a URL delete the file instead: it is then fetched again)."
    )


def read_prepared(
    folder: Path,
    *,
    image_size: int,
    settings: Mapping[str, Any],
    dataset: str = "",
    classes: Sequence[str] = (),
    full: bool = False,
) -> Split:
    """The records of a prepared folder: those it was made of, in their order, but for the pictures.

    Every shard is compared with the manifest, `full` also its checksum. `settings` must be those
    of the preparation, `dataset`, unless "", the name of the set in it. `classes` chooses some,
    as "class" or "dataset/class"; they are numbered anew from 0.

    Raises:
        ValueError: Nothing, or nothing complete, is prepared there; a shard is missing or damaged;
            it holds other images, or images resized to another size than `image_size`.
    """
    found = manifest.read(folder)
    command = manifest.command_for(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no prepared data; write them first, by the same command with "
            f"{command}, or read the images where they are: --config.data.source=folder."
        )
    if found.shards is None:
        raise ValueError(
            f"The preparation of {folder} is still running, or was interrupted; the same command "
            f"with {command} goes on where it stopped."
        )
    _check_fits(found, folder, image_size, settings, dataset)
    manifest.check_shards(folder, found.shards, full=full, repair=repair(folder))
    numbers = _chosen(found, classes)
    records: dict[str, list[Record]] = {split: [] for split in manifest.SPLITS}
    for shard in found.shards:
        records[shard.split] += _records(folder, shard, found, numbers)
    names = [found.class_names[label] for label in numbers]
    return Split(records["train"], records["test"], names)


def _check_fits(
    found: Manifest, folder: Path, image_size: int, settings: Mapping[str, Any], dataset: str
) -> None:
    names = sorted({name for name, _ in found.classes})
    lines = manifest.differences(found.settings, settings, flag="--config.")
    if found.image_size not in (None, image_size):
        lines.append(
            f"images resized to {found.image_size} pixels instead of {image_size} "
            f"(--config.data.image_size={found.image_size})"
        )
    if dataset and names != [dataset]:
        lines.append(
            f"data.name={', '.join(names)} instead of {dataset} (--config.data.name={names[0]})"
        )
    if lines:
        raise ValueError(
            f"{folder} holds data prepared with {'; '.join(lines)}. Use its settings, or prepare "
            f"these in another folder: {manifest.command_for(f'{folder}-{image_size}')}."
        )


def _chosen(found: Manifest, classes: Sequence[str]) -> dict[int, int]:
    """The new label of every chosen one."""
    known: dict[str, list[int]] = {}
    for label, (dataset, name) in enumerate(found.classes):
        for form in (name, f"{dataset}/{name}"):
            known.setdefault(composed(form), []).append(label)
    chosen = choose_classes(known, classes, "the prepared data have no such class")
    labels = {label for name in chosen for label in known[name]}
    return {old: new for new, old in enumerate(sorted(labels))}


def _records(
    folder: Path, shard: Shard, found: Manifest, numbers: Mapping[int, int]
) -> list[Record]:
    rows = listings.read(folder / shard.listing).rows
    reader = ShardReader(folder, shard)
    return [
        _record(row, found, numbers, reader, position)
        for position, row in enumerate(rows)
        if row.label in numbers
    ]


def _record(
    row: Row, found: Manifest, numbers: Mapping[int, int], shard: ShardReader, position: int
) -> Record:
    dataset, class_name = found.classes[row.label]
    return Record(
        image=Picture(shard, position, "image"),
        mask=Picture(shard, position, "mask") if row.masked else None,
        dataset=dataset,
        class_name=class_name,
        label=numbers[row.label],
        key=row.key,
        anomalous=row.anomalous,
        defect=row.defect,
        sample=row.sample,
        view=row.view,
        # A resized image is what the crop showed.
        crop=row.crop if found.image_size is None else None,
    )
