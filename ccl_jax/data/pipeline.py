"""Batches from records, by grain: endless shuffled ones to train, padded ones to evaluate."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import grain
import numpy as np
from absl import flags

from ccl_jax.data.records import Record, read_image, read_mask

Batch = dict[str, np.ndarray]


class Batches(Iterator[Batch], AbstractContextManager):
    """An iterator over batches; close it, or use it in a `with`, to end its threads and processes.

    A file that cannot be read raises its `ValueError` from `next`.
    """

    def __init__(self, dataset: grain.MapDataset, *, threads: int, workers: int) -> None:
        # A thread reads a whole batch; a buffer of as many batches keeps every thread busy.
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        batches = dataset.to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # outside absl.app.run, and grain's workers read one
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
            )
        self._iterator = iter(batches)
        self._shared = workers > 0

    def __next__(self) -> Batch:
        batch = next(self._iterator)
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
) -> Batches:
    """Endless batches `image` uint8 [b, h, w, 3] and `label` int32 [b], from batch `start` on.

    Batch i depends on `seed` and i alone, whatever the numbers of threads, workers and processes;
    a process gets its consecutive share of the rows. "plain" shuffles every epoch anew, and
    batches run across its end; "class_balanced" draws a class, then one of its images, each
    equally likely.

    Raises:
        ValueError: More images in a batch than there are, a batch that the processes cannot
            divide, or an unknown `shuffle`.
    """
    steps_per_epoch(len(records), batch_size)  # refuses a batch larger than the data
    rows = _rows(batch_size, process_index, process_count, setting="config.train.batch_size")
    order = _training_order([record.label for record in records], seed, shuffle)
    read = functools.partial(_read_train_batch, list(records), image_size, rows)
    # grain's own endless length overflows in batches of one, hence an end.
    batches = order[start * batch_size : 2**62].batch(batch_size)
    return Batches(batches.map(read), threads=threads, workers=workers)


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
) -> Batches:
    """Every record once, in order, over all processes; each process gets as many batches.

    A batch is `image` uint8 [b, h, w, 3], `label` int32 [b], `mask` uint8 [b, h, w] (0 or 1; 0
    for a record without one), `anomalous` bool [b], `index` int32 [b] into `records`, and `real`
    bool [b]. The last batch is filled up with rows that are zero, `index` -1 and `real` False.

    Raises:
        ValueError: The processes cannot divide a batch.
    """
    rows = _rows(batch_size, process_index, process_count, setting="config.eval.batch_size")
    read = functools.partial(_read_evaluation_batch, list(records), image_size, batch_size, rows)
    number = -(-len(records) // batch_size)
    return Batches(grain.MapDataset.range(number).map(read), threads=threads, workers=workers)


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
    records: list[Record], image_size: int, rows: slice, indices: np.ndarray
) -> Batch:
    mine = [records[index] for index in indices[rows]]
    return {
        "image": np.stack([read_image(record, image_size) for record in mine]),
        "label": np.array([record.label for record in mine], np.int32),
    }


def _read_evaluation_batch(
    records: list[Record], image_size: int, batch_size: int, rows: slice, number: int
) -> Batch:
    indices = number * batch_size + np.arange(batch_size, dtype=np.int32)[rows]
    real = indices < len(records)
    square = (len(indices), image_size, image_size)
    batch: Batch = {
        "image": np.zeros((*square, 3), np.uint8),
        "label": np.zeros(len(indices), np.int32),
        "mask": np.zeros(square, np.uint8),
        "anomalous": np.zeros(len(indices), bool),
        "index": np.where(real, indices, -1).astype(np.int32),
        "real": real,
    }
    for row, index in enumerate(indices[real]):
        record = records[index]
        batch["image"][row] = read_image(record, image_size)
        batch["label"][row] = record.label
        batch["mask"][row] = read_mask(record, image_size)
        batch["anomalous"][row] = record.anomalous
    return batch
