"""What a folder of prepared shards says about itself, and whether its files are as it says."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from array_record.python import array_record_module

VERSION = 1  # goes up with every change of what is stored, so that old shards are not misread
NAME = "prepared.json"
SPLITS = ("train", "test")
# Set for random access: reading ahead would fetch records that nobody asked for.
READING = "readahead_buffer_size:0,max_parallelism:0"


class Shard(NamedTuple):
    """One file of records, and the listing with what is known about each."""

    file: str
    listing: str
    split: str
    records: int
    bytes: int
    sha256: str
    listing_sha256: str


class Planned(NamedTuple):
    """A shard to be: which records of which split go into it."""

    file: str
    listing: str
    split: str
    start: int
    stop: int

    def is_that_of(self, shard: Shard) -> bool:
        """Whether a shard is this one: no other names are ever opened, fetched or published."""
        return shard[:4] == (self.file, self.listing, self.split, self.stop - self.start)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All about a prepared data set but its records; `shards` is None until all are written."""

    settings: dict[str, Any]  # those that chose the images
    images: str  # "original" or "resized"
    image_size: int | None  # pixels, of resized images
    classes: list[list[str]]  # (dataset, class name) of every label
    class_names: list[str]  # the names of the labels in Split
    records: dict[str, int]  # per split
    per_shard: dict[str, int]  # records per shard, by split
    version: int = VERSION
    shards: list[Shard] | None = None

    def planned(self) -> Iterator[Planned]:
        """Yields every shard, in the order of the records."""
        for split in SPLITS:
            total, size = self.records[split], self.per_shard[split]
            count = -(-total // size)
            for number in range(count):
                yield Planned(
                    f"ccl_jax-{split}.array_record-{number:05d}-of-{count:05d}",
                    f"records/{split}-{number:05d}.json",
                    split,
                    number * size,
                    min((number + 1) * size, total),
                )

    def to_json(self) -> str:
        """The text of the file."""
        values = dataclasses.asdict(self)
        values["shards"] = self.shards and [shard._asdict() for shard in self.shards]
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, where: str) -> Manifest:
    """The manifest of a text that lies at `where`.

    Raises:
        ValueError: It is damaged, names other files than it should, or is of another version of the
            format.
    """
    folder = os.path.dirname(where)
    try:
        values = dict(json.loads(text))
        version = values["version"]
        if version == VERSION:
            shards = values.pop("shards")
            found = Manifest(**values, shards=shards and [Shard(**shard) for shard in shards])
            _check_names(found)
            return found
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(
            f"{where} is damaged ({error}); delete the prepared data and write them again: "
            f"{removal_of(folder)}, then {command_for(folder)}."
        ) from error
    raise ValueError(
        f"{where} is of version {version} of the format, and this ccl_jax reads version {VERSION}; "
        f"prepare the data again in another folder: {command_for(f'{folder}-{VERSION}')}."
    )


def _check_names(found: Manifest) -> None:
    """Raises ValueError for a shard with a name, split or length that does not follow."""
    planned = found.planned()
    for shard in found.shards or ():
        expected = next(planned, None)
        if expected is None or not expected.is_that_of(shard):
            raise ValueError(
                f"it names {shard.file} with {shard.listing}, {shard.records} records to "
                f"{shard.split}, where {expected.file if expected else 'nothing'} must be"
            )
    if found.shards is not None and (expected := next(planned, None)):
        raise ValueError(f"it does not name {expected.file}")


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none."""
    path = folder / NAME
    return from_json(path.read_text("utf-8"), str(path)) if path.exists() else None


def check_same(found: Manifest, wanted: Manifest, where: str) -> None:
    """Compares prepared data with what is to be prepared.

    Raises:
        ValueError: They are of other images, or in another form; the text has every difference.
    """
    lines = differences(found.settings, wanted.settings)
    for name in ("images", "image_size", "class_names", "classes", "records"):
        lines += differences({name: getattr(found, name)}, {name: getattr(wanted, name)})
    if lines:
        raise ValueError(
            f"{where} holds data prepared with {'; '.join(lines)}. Choose another folder, e.g. "
            f"--config.data.prepared={where}-2, or delete it to have it written again: "
            f"{removal_of(where)}"
        )


def removal_of(where: str) -> str:
    """The command that deletes a prepared folder, or what to do with one at a URL."""
    return f"delete all below {where} there" if "://" in where else f"rm -r {where}"


def command_for(where: str | Path) -> str:
    """The flags that have data prepared in a folder or at a URL."""
    return f"--job prepare --config.data.source=prepared --config.data.prepared={where}"


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, flag: str = ""
) -> list[str]:
    """Lines for what differs, each with the flag to take what was found, if `flag` begins one."""
    lines = []
    wanted = json.loads(json.dumps(dict(wanted)))  # which makes tuples lists, as in the file
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name), wanted.get(name)
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list):
            gone, added = [v for v in old if v not in new], [v for v in new if v not in old]
            line = f"other {name} (only there: {gone[:9]}, only here: {added[:9]})"
        else:
            line = f"{name}={old!r} instead of {new!r}"
        value = f'"{tuple(old)}"' if isinstance(old, list) else old  # as a shell takes it
        lines.append(line + (f" ({flag}{name}={value})" if flag and name in found else ""))
    return lines


def damage(folder: Path, shard: Shard, *, full: bool) -> str:
    """What is wrong with a shard or its listing, "" if nothing is.

    Sizes, the number of records and the checksum of the listing are always compared, the checksum
    of the records where `full`. (A damaged record is found when it is read, at the latest.)
    """
    path, listing = folder / shard.file, folder / shard.listing
    for file in (path, listing):
        if not file.is_file():
            return f"{file} is missing"
    if path.stat().st_size != shard.bytes:
        return f"{path} has {path.stat().st_size} bytes instead of {shard.bytes}"
    if file_sha256(listing) != shard.listing_sha256:
        return f"{listing} has another checksum than when it was written"
    try:
        count = count_records(path)
    except ValueError as error:
        return str(error)
    if count != shard.records:
        return f"{path} holds {count} records instead of {shard.records}"
    if full and file_sha256(path) != shard.sha256:
        return f"{path} has another checksum than when it was written"
    return ""


def count_records(path: Path) -> int:
    """How many records a shard holds; ValueError where it is missing or has a damaged end."""
    reader = array_record_module.ArrayRecordReader(str(path), READING)
    count = reader.num_records()  # 0 also of a file that is none; only closing tells
    try:
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    return count


def check_shards(folder: Path, shards: Iterable[Shard], *, full: bool, repair: str) -> None:
    """Compares every shard with the manifest, as `damage` does.

    Raises:
        ValueError: Some are missing or damaged; the text has the first and how to `repair` it.
    """
    shards = list(shards)
    found = [text for shard in shards if (text := damage(folder, shard, full=full))]
    if found:
        raise ValueError(
            f"{len(found)} of {len(shards)} shards of the prepared data are damaged or missing, "
            f"the first: {found[0]}. {repair}"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Lets one process at a time write into a folder; the others wait.

    Raises:
        ValueError: The folder named by `setting` cannot be written.
    """
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"{setting}={folder} cannot be written ({error}); choose another folder, e.g. "
            f"--{setting}=prepared/{folder.name}."
        ) from error
    try:
        yield
    finally:
        lock.release()
