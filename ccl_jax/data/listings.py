"""What is known of each record of a shard: its fields, and the files that it was made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccl_jax.data import manifest
from ccl_jax.data.manifest import Planned, Shard
from ccl_jax.data.records import Record, Source, Stored


class Row(NamedTuple):
    """What a listing says of a record: all but its pictures and its class, which `label` names."""

    key: str
    label: int
    anomalous: bool
    defect: str
    sample: str
    view: str
    crop: tuple[int, int, int, int] | None
    masked: bool


class Stamp(NamedTuple):
    """A file as it was when it was prepared: bytes, time of its last change, content."""

    size: int
    mtime_ns: int
    digest: str


class Listing(NamedTuple):
    """The listing of a shard, read back."""

    shard: Shard
    rows: list[Row]
    stamps: list[list[list[Any]]]  # values of the Stamp of the image, and of the mask if it has one


def write(
    folder: Path,
    planned: Planned,
    *,
    size: int,
    sha256: str,
    rows: list[Row],
    stamps: list[list[Stamp]],
) -> Shard:
    """Writes the listing of a shard of `size` bytes, complete or not at all."""
    shard = {
        "file": planned.file,
        "listing": planned.listing,
        "split": planned.split,
        "records": len(rows),
        "bytes": size,
        "sha256": sha256,
    }
    content = {"shard": shard, "rows": rows, "stamps": stamps}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    manifest.write_text(folder / planned.listing, text)
    return read(folder / planned.listing).shard


def read(path: Path) -> Listing:
    """A listing as it was written; ValueError where the file is damaged or missing."""
    try:
        content = json.loads(path.read_text("utf-8"))
        shard = Shard(**content["shard"], listing_sha256=manifest.file_sha256(path))
        rows = [_row_from(values) for values in content["rows"]]
        stamps = content["stamps"]  # which most callers do not look at
        if [len(of) for of in stamps] != [1 + row.masked for row in rows]:
            raise ValueError("its rows and stamps do not go together")
        if len(rows) != shard.records:
            raise ValueError(f"it has {len(rows)} rows and should have {shard.records}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}).") from error
    return Listing(shard, rows, stamps)


def _row_from(values: list[Any]) -> Row:
    row = Row(*values)
    return row if row.crop is None else row._replace(crop=(*row.crop,))


def row_of(record: Record) -> Row:
    """What a listing says of a record."""
    return Row(
        record.key,
        record.label,
        record.anomalous,
        record.defect,
        record.sample,
        record.view,
        record.crop,
        record.mask is not None,
    )


def changes(records: Sequence[Record], listing: Listing) -> Iterator[str]:
    """Yields what is no longer as it was when a shard of these records was written."""
    for record, row, stamps in zip(records, listing.rows, listing.stamps, strict=True):
        now = row_of(record)
        if row.key != now.key:
            yield f"{now.key} is where {row.key} was"
        elif row != now:
            yield f"{now.key} is {now} instead of {row}"
        else:
            for source, stamp in zip(sources_of(record), stamps, strict=True):
                if reason := _change(source, Stamp(*stamp)):
                    yield f"{source if isinstance(source, Path) else record.key} {reason}"


def _change(source: Source, stamp: Stamp) -> str:
    """How a file differs from what was prepared; only a copied one has to be read."""
    if (size := size_of(source)) != stamp.size:
        return f"has {size} bytes instead of {stamp.size}"
    if _mtime_ns(source) != stamp.mtime_ns and _digest(_read(source)) != stamp.digest:
        return "has another content"
    return ""


def stamped(source: Source) -> tuple[Stamp, bytes]:
    """The stamp and the content of a file."""
    time = _mtime_ns(source)  # before it is read, so that a change meanwhile is noticed later
    content = _read(source)
    return Stamp(len(content), time, _digest(content)), content


def sources_of(record: Record) -> list[Path | bytes | Stored]:
    """Where a record's image is, and its mask if it has one."""
    return [record.image] if record.mask is None else [record.image, record.mask]


def size_of(source: Source) -> int:
    """Bytes of an encoded picture."""
    return os.stat(source).st_size if isinstance(source, Path | str) else len(_read(source))


def _read(source: Source) -> bytes:
    if isinstance(source, Stored):
        return source.read()
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _mtime_ns(source: Source) -> int:
    return os.stat(source).st_mtime_ns if isinstance(source, Path | str) else 0


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
