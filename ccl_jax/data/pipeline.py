"""Batches from records, by grain: endless shuffled ones to train, padded ones to evaluate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import grain
import numpy as np
from absl import flags

from ccl_jax.data.pictures import DecodedCache, Pictures, TrainingImages
from ccl_jax.data.records import Record

Batch = dict[str, np.ndarray]
Unreadable = dict[int, str]  # index of a record: why its file cannot be read


class Batches(Iterator[Batch], AbstractContextManager):
    """An iterator over batches; close it, or use it in a `with`, to end its threads and processes.

    A file that cannot be read raises its `ValueError` from `next`, unless it is to be skipped: then
    it is in `unreadable` from the batch on that it is missing from, and `report` was called once.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        *,
        threads: int,
        workers: int,
        report: Callable[[str], object] = print,
    ) -> None:
        # A thread reads a whole batch; a buffer of as many batches keeps every thread busy.
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        batches = dataset.to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # outside absl.app.run, and grain's workers read one
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
            )
        self.unreadable: Unreadable = {}
        self._report = report
        self._iterator = iter(batches)
        self._shared = workers > 0

    def __next__(self) -> Batch:
        batch, unreadable = next(self._iterator)
        for index, reason in unreadable.items():
            if index not in self.unreadable:
                self.unreadable[index] = reason
                self._report(reason)
        # Workers hand over shared memory; a copy lets it go at once, not when the program ends.
        return {name: np.array(array) for name, array in batch.items()} if self._shared else batch

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and processes; nothing comes after the call."""
        if isinstance(self._iterator, grain.DatasetIterator):
            self._iterator.close()
        self._iterator = iter(())  # grain's own must not live until the interpreter ends


def train_batches(
    records: Sequence[Record],
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    shuffle: str,
    start: int = 0,
    threads: int,
    workers: int,
    process_index: int = 0,
    process_count: int = 1,
    cache: DecodedCache | None = None,
    bad_files: str = "stop",
    report: Callable[[str], object] = print,
) -> Batches:
    """Endless batches `image` uint8 [b, h, w, 3] and `label` int32 [b], from batch `start` on.

    Batch i depends on `seed` and i alone, whatever the numbers of threads, workers and processes;
    a process gets its consecutive share of the rows. "plain" shuffles every epoch anew, and
    batches run across its end; "class_balanced" draws a class, then one of its images, each
    equally likely.

    Images that `cache` has room for are decoded once, by threads of this process: Pillow lets them
    run side by side, and `workers` would each fill a memory of its own. With `bad_files` "skip"
    another image of its class stands in for one that cannot be read (`TrainingImages`), and
    `report` is told, once per file.

    Raises:
        ValueError: More images in a batch than there are, a batch that the processes cannot
            divide, or an unknown `shuffle` or `bad_files`.
    """
    steps_per_epoch(len(records), batch_size)  # refuses a batch larger than the data
    rows = _rows(batch_size, process_index, process_count, setting="config.train.batch_size")
    order = _training_order([record.label for record in records], seed, shuffle)
    pictures = _pictures(records, image_size, cache, masks=False)
    images = TrainingImages(pictures, bad_files)
    read = functools.partial(_read_train_batch, images, pictures.records, rows)
    # grain's own endless length overflows in batches of one, hence an end.
    batches = order[start * batch_size : 2**62].batch(batch_size)
    return Batches(
        batches.map(read),
        threads=threads,
        workers=0 if pictures.kept else workers,
        report=report,
    )


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one pass over the images; a partial last one does not count.

    Raises:
        ValueError: Not even one batch is full.
    """
    if batch_size > images:
        raise ValueError(
            f"config.train.batch_size={batch_size} is more than the {images} training images; "
            f"add images, or use at most --config.train.batch_size={images}."
        )
    return images // batch_size


def evaluation_batches(
    records: Sequence[Record],
    *,
    image_size: int,
    batch_size: int,
    threads: int,
    workers: int,
    process_index: int = 0,
    process_count: int = 1,
    cache: DecodedCache | None = None,
) -> Batches:
    """Every record once, in order, over all processes; each process gets as many batches.

    A batch is `image` uint8 [b, h, w, 3], `label` int32 [b], `mask` uint8 [b, h, w] (0 or 1; 0
    for a record without one), `anomalous` bool [b], `index` int32 [b] into `records`, and `real`
    bool [b]. The last batch is filled up with rows that are zero, `index` -1 and `real` False.
    An unreadable file always stops it: every test image is to be scored. `cache` keeps what it has
    room for until the next pass, as in training.

    Raises:
        ValueError: The processes cannot divide a batch.
    """
    rows = _rows(batch_size, process_index, process_count, setting="config.eval.batch_size")
    pictures = _pictures(records, image_size, cache, masks=True)
    read = functools.partial(_read_evaluation_batch, pictures, batch_size, rows)
    number = -(-len(records) // batch_size)
    return Batches(
        grain.MapDataset.range(number).map(read),
        threads=threads,
        workers=0 if pictures.kept else workers,
    )


def _pictures(
    records: Sequence[Record], size: int, cache: DecodedCache | None, *, masks: bool
) -> Pictures:
    return Pictures(records, size) if cache is None else cache.pictures(records, size, masks=masks)


def _training_order(labels: Sequence[int], seed: int, shuffle: str) -> grain.MapDataset:
    """Endless indices of records."""
    indices = grain.MapDataset.range(len(labels)).seed(seed)
    if shuffle == "plain":
        return indices.shuffle().repeat(None)
    if shuffle == "class_balanced":
        classes = [np.flatnonzero(np.equal(labels, label)) for label in sorted(set(labels))]
        return indices.repeat(None).random_map(functools.partial(_draw_balanced, classes))
    raise ValueError(
        f"config.data.shuffle={shuffle!r} is unknown; use --config.data.shuffle=plain or "
        "--config.data.shuffle=class_balanced."
    )


def _draw_balanced(classes: list[np.ndarray], _: int, rng: np.random.Generator) -> int:
    return int(rng.choice(classes[rng.integers(len(classes))]))


def _rows(batch_size: int, process_index: int, process_count: int, *, setting: str) -> slice:
    """The consecutive rows of a global batch that this process reads."""
    rows, rest = divmod(batch_size, process_count)
    if rest or not rows:
        raise ValueError(
            f"{setting}={batch_size} cannot be split over {process_count} processes; use a "
            f"multiple of {process_count}, e.g. --{setting}={(rows + 1) * process_count}."
        )
    return slice(process_index * rows, (process_index + 1) * rows)


def _read_train_batch(
    images: TrainingImages, records: list[Record], rows: slice, indices: np.ndarray
) -> tuple[Batch, Unreadable]:
    unreadable: Unreadable = {}
    mine = []
    for index in indices[rows]:
        image, passed = images.image(int(index))
        mine.append(image)
        unreadable |= passed
    labels = np.array([records[index].label for index in indices[rows]], np.int32)
    return {"image": np.stack(mine), "label": labels}, unreadable


def _read_evaluation_batch(
    pictures: Pictures, batch_size: int, rows: slice, number: int
) -> tuple[Batch, Unreadable]:
    indices = number * batch_size + np.arange(batch_size, dtype=np.int32)[rows]
    real = indices < len(pictures.records)
    square = (len(indices), pictures.size, pictures.size)
    batch: Batch = {
        "image": np.zeros((*square, 3), np.uint8),
        "label": np.zeros(len(indices), np.int32),
        "mask": np.zeros(square, np.uint8),
        "anomalous": np.zeros(len(indices), bool),
        "index": np.where(real, indices, -1).astype(np.int32),
        "real": real,
    }
    for row, index in enumerate(indices[real]):
        record = pictures.records[index]
        batch["image"][row] = pictures.image(int(index))
        batch["label"][row] = record.label
        batch["mask"][row] = pictures.mask(int(index))
        batch["anomalous"][row] = record.anomalous
    return batch, {}
