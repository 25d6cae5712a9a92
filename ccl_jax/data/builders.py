"""Prepared data: records written once as ArrayRecord shards, in the form of tensorflow-datasets.

The features, the examples, the shard files and the metadata are tfds's own, so that
`tfds.builder_from_directory(folder).as_data_source("train")` reads a prepared folder without this
package, and no TensorFlow is needed for any of it. What is not used is tfds's
GeneratorBasedBuilder: it writes everything anew after an interruption, gives every process that
starts it a full copy to write, shuffles, and knows no checksums. Here every finished shard stays,
with a listing of its records beside it, and `prepared.json` (see `manifest`) comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import example_serializer, file_adapters

from ccl_jax.data import listings, manifest
from ccl_jax.data.layouts import Split
from ccl_jax.data.listings import Stamp, row_of, size_of, sources_of, stamped
from ccl_jax.data.manifest import Manifest, Planned, Shard
from ccl_jax.data.records import Record, StoreError, read_image, read_mask

# Of a shard, about: what a killed preparation loses, and what is fetched at once.
SHARD_BYTES = 2**27
SHARD_RECORDS = 8192  # at most, however small the images are
Progress = Callable[[int, int], None]
Report = Callable[[str], object]


class Summary(NamedTuple):
    """How many shards a preparation wrote, and how many were there already."""

    written: int
    kept: int


def prepare(
    split: Split,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    image_size: int | None,
    about: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
    progress: Progress | None = None,
    unreadable: Report | None = None,
) -> Summary:
    """Writes the shards of a split into a folder, or those that are missing, and compares the rest.

    Images and masks are stored as they are found, or, with an `image_size`, as PNG of what
    `read_image` and `read_mask` give at that size, so that batches are the same. `settings` are
    those that chose the images; another start must have the same. `about` goes into tfds's
    metadata: description, homepage, citation, license. `progress(done, total)` is called after
    every record. Several processes may start it together: one writes, the others wait.

    A training image that cannot be resized is stored as it is found, and `unreadable` is told why;
    without `unreadable` it stops the preparation. It cannot be read from the shard either.

    Raises:
        ValueError: A picture cannot be read; records and class names do not fit; the folder holds
            something else, such as the data of other images or another size; or a picture has
            changed since it was prepared.
    """
    folder = Path(os.path.abspath(folder))
    with manifest.locked(folder, "config.data.prepared"):
        wanted = describe(split, settings, image_size, shard_bytes)
        found = manifest.read(folder)
        if found is not None:
            manifest.check_same(found, wanted, str(folder))
            wanted = dataclasses.replace(wanted, per_shard=found.per_shard)
        elif any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(
                f"{folder} holds files, but no prepared data ({manifest.NAME} is missing); choose "
                f"another folder, e.g. --config.data.prepared={folder}-prepared."
            )
        else:
            manifest.write_text(folder / manifest.NAME, wanted.to_json())
        shards = _kept(folder, wanted, split)
        missing = [planned for planned in wanted.planned() if planned.file not in shards]
        done, total = 0, sum(planned.stop - planned.start for planned in missing)
        for planned in missing:
            write = functools.partial(_write_shard, folder, planned, getattr(split, planned.split))
            tick = progress and functools.partial(_count_on, progress, done, total)
            allowed = unreadable if planned.split == "train" else None
            shards[planned.file] = write(image_size, threads, tick, allowed)
            done += planned.stop - planned.start
        complete = dataclasses.replace(
            wanted, shards=[shards[planned.file] for planned in wanted.planned()]
        )
        if complete != found or not (folder / "dataset_info.json").exists():  # a fetched copy
            _write_tfds_metadata(folder, complete, about or {})
            manifest.write_text(folder / manifest.NAME, complete.to_json())
    return Summary(len(missing), len(shards) - len(missing))


def describe(
    split: Split, settings: Mapping[str, Any], image_size: int | None, shard_bytes: int
) -> Manifest:
    """The manifest of a preparation that has not begun.

    Raises:
        ValueError: A class has no picture, or a picture no class.
    """
    classes = {r.label: [r.dataset, r.class_name] for r in (*split.train, *split.test)}
    if sorted(classes) != list(range(len(split.class_names))):
        raise ValueError(
            f"The pictures have the labels {sorted(classes)}, and there are "
            f"{len(split.class_names)} classes: {', '.join(split.class_names)}. Leave out those "
            "without pictures, with --config.data.classes, or number the classes from 0."
        )
    return Manifest(
        settings=json.loads(json.dumps(dict(settings))),  # as it will be read
        images="original" if image_size is None else "resized",
        image_size=image_size,
        classes=[classes[label] for label in sorted(classes)],
        class_names=list(split.class_names),
        records={name: len(getattr(split, name)) for name in manifest.SPLITS},
        per_shard={
            name: _records_per_shard(getattr(split, name), image_size, shard_bytes)
            for name in manifest.SPLITS
        },
    )


def _records_per_shard(records: Sequence[Record], image_size: int | None, shard_bytes: int) -> int:
    if image_size is not None:
        each = 2 * image_size**2  # about what PNG needs where there is noise
    else:
        each = sum(size_of(record.image) for record in records) // max(len(records), 1)
    return min(max(shard_bytes // max(each, 1), 1), SHARD_RECORDS)


def _count_on(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _kept(folder: Path, wanted: Manifest, split: Split) -> dict[str, Shard]:
    """The shards that are there, undamaged and of these records; ValueError for other records."""
    shards = {}
    changed: list[str] = []
    for planned in wanted.planned():
        try:
            listing = listings.read(folder / planned.listing)
        except ValueError:
            continue  # never finished, or damaged: written again, which is what this is for
        if not planned.is_that_of(listing.shard):
            continue
        records = getattr(split, planned.split)[planned.start : planned.stop]
        changed += listings.changes(records, listing)
        if not manifest.damage(folder, listing.shard, full=True):
            shards[planned.file] = listing.shard
    if changed:
        raise ValueError(
            f"{len(changed)} pictures have changed since they were prepared in {folder}, the "
            f"first: {changed[0]}. Prepare them in another folder, e.g. "
            f"--config.data.prepared={folder}-2, or delete this one to have it written again: "
            f"rm -r {folder}"
        )
    return shards


def _write_shard(
    folder: Path,
    planned: Planned,
    records: Sequence[Record],
    image_size: int | None,
    threads: int,
    tick: Callable[[int], None] | None,
    unreadable: Report | None,
) -> Shard:
    """Writes a shard and then its listing; each is there complete or not at all."""
    records = records[planned.start : planned.stop]
    serializer = example_serializer.ExampleSerializer(_features(image_size).get_serialized_info())
    stamps: list[list[Stamp]] = []

    def examples() -> Iterator[tuple[int, bytes]]:
        encode = functools.partial(_encode, image_size=image_size, unreadable=unreadable)
        for done, (stamp, example) in enumerate(_in_threads(encode, records, threads), start=1):
            stamps.append(stamp)
            # Deterministic, so that the same pictures give the same checksums.
            yield done, serializer.get_tf_example(example).SerializeToString(deterministic=True)
            if tick is not None:
                tick(done)

    partial = folder / f".{planned.file}.partial"
    try:
        file_adapters.ArrayRecordFileAdapter.write_examples(partial, examples())
    except RuntimeError as error:  # of array_record, such as a full disk
        raise ValueError(
            f"{partial} cannot be written ({error}); make room there and run the same command "
            "again: finished shards are kept."
        ) from error
    if (count := manifest.count_records(partial)) != len(records):
        raise ValueError(
            f"{partial} holds {count} records after {len(records)} were written; see to the disk "
            "and run the same command again."
        )
    size, sha256 = partial.stat().st_size, manifest.file_sha256(partial)
    os.replace(partial, folder / planned.file)
    rows = [row_of(record) for record in records]
    return listings.write(folder, planned, size=size, sha256=sha256, rows=rows, stamps=stamps)


def _in_threads(
    function: Callable[[Record], Any], records: Sequence[Record], threads: int
) -> Iterator[Any]:
    """Results in order, of which only few are held at a time."""
    few = 8 * threads
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(records), few):
            yield from pool.map(function, records[start : start + few])


def _encode(
    record: Record, *, image_size: int | None, unreadable: Report | None
) -> tuple[list[Stamp], dict[str, Any]]:
    """The stamps of a record's files, and its example."""
    stamps, found = zip(*map(stamped, sources_of(record)), strict=True)
    pictures, crop = list(found), record.crop or ()
    if image_size is not None:
        pictures = _resized(record, pictures, image_size, unreadable)
        crop = ()
    example = row_of(record)._asdict()
    del example["masked"]
    example |= {"crop": crop, "dataset": record.dataset, "class_name": record.class_name}
    example |= {"image": pictures[0], "mask": b"".join(pictures[1:])}
    return list(stamps), example


def _resized(
    record: Record, found: list[bytes], image_size: int, unreadable: Report | None
) -> list[bytes]:
    """PNG of the image, and of the mask if there is one; as `found` if `unreadable` may be told."""
    try:
        pictures = [_png(read_image(record, image_size))]
    except StoreError:
        raise
    except ValueError as error:
        if unreadable is None:
            raise
        unreadable(str(error))
        # The crop is not kept, and without it the picture might be read after all.
        return [b"" if record.crop else found[0], *found[1:]]
    if record.mask is not None:
        pictures.append(_png(255 * read_mask(record, image_size)))
    return pictures


def _features(image_size: int | None) -> tfds.features.FeaturesDict:
    text, flag = tfds.features.Text(), np.bool_
    encoded = tfds.features.Scalar(np.object_)
    square = (image_size, image_size, 3)
    return tfds.features.FeaturesDict(
        {
            # tfds cannot decode every format, so what is found stays bytes.
            "image": encoded if image_size is None else tfds.features.Image(shape=square),
            "mask": encoded,  # of a picture in which all but 0 is defect; empty: none
            **{name: text for name in ("key", "dataset", "class_name", "defect", "sample", "view")},
            "label": np.int64,
            "anomalous": flag,
            "crop": tfds.features.Sequence(np.int32),  # left, top, right, bottom; empty: none
        }
    )


def _write_tfds_metadata(folder: Path, complete: Manifest, about: Mapping[str, str]) -> None:
    shards = complete.shards or []
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="ccl_jax", filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for shard in shards if shard.split == split],
            num_bytes=sum(shard.bytes for shard in shards if shard.split == split),
            filename_template=template,
        )
        for split in manifest.SPLITS
        if complete.records[split]
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(complete.image_size),
        split_infos=infos,
        version=f"{complete.version}.0.0",
        check_data=False,  # it would print; the shards have been counted
        **about,
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)  # decodes faster than 6 and 1
    return buffer.getvalue()
