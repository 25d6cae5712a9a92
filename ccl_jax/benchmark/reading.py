"""How fast training images come from their files or from memory, and what the devices wait."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ccl_jax import mesh
from ccl_jax.ahead import Ahead
from ccl_jax.benchmark.training import Steps
from ccl_jax.data import pipeline
from ccl_jax.data.pictures import DecodedCache
from ccl_jax.data.records import Record
from ccl_jax.loop import next_batch
from ccl_jax.throughput import Throughput


class Reading(NamedTuple):
    """What was measured of the input pipeline."""

    images: int  # that were read
    from_files: float  # images/s
    from_memory: float | None  # images/s; None where memory keeps no training images
    input_wait: float  # share in [0, 1] of the time of a loop in which the devices waited
    loop_images_per_second: float


class Source(NamedTuple):
    """The training images, and how they are read."""

    records: Sequence[Record]
    image_size: int
    batch_size: int
    seed: int
    threads: int
    workers: int
    cache_bytes: int  # of memory for decoded images
    keeps: bool  # whether all training images fit in there
    bad_files: str

    def some(self, images: int) -> list[Record]:
        """Whole batches of at most so many records, at least one, spread over all of them."""
        number = min(len(self.records), max(images, self.batch_size))
        number = max(number // self.batch_size, 1) * self.batch_size
        where = np.linspace(0, len(self.records) - 1, min(number, len(self.records)))
        return [self.records[int(index)] for index in where]

    def batches(self, records: Sequence[Record]) -> pipeline.Batches:
        """The training batches of these records."""
        return pipeline.train_batches(
            records,
            image_size=self.image_size,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle="plain",
            threads=self.threads,
            workers=self.workers,
            cache=DecodedCache(self.cache_bytes if self.keeps else 0),
            bad_files=self.bad_files,
        )


def time_reading(
    source: Source, images: int, steps: Steps, *, where: jax.sharding.Mesh, repeats: int
) -> Reading:
    """Reads so many images from their files, then from memory, then for a loop of `repeats` steps.

    Files may be in the system's own memory. The loop is a training's: batches are sent ahead, and
    a wait counts where no step computes; it reads from memory where that keeps the images.
    """
    records = source.some(images)
    with source.batches(records) as batches:
        number = len(records) // source.batch_size
        from_files = _speed(batches, number, source.batch_size)
        kept = _speed(batches, number, source.batch_size) if source.keeps else None
        with Ahead(batches, where) as sent:
            figures = _loop(sent, steps, source.batch_size, repeats)
    return Reading(
        len(records), from_files, kept, figures["input_wait"], figures["images_per_second"]
    )


def _speed(
    batches: Iterator[dict[str, np.ndarray]],
    number: int,
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Images/s over so many batches."""
    begin = clock()
    for _ in range(number):
        next(batches)
    return number * batch_size / (clock() - begin)


def _loop(batches: Ahead, steps: Steps, batch_size: int, repeats: int) -> dict[str, float]:
    """The figures of a loop of so many steps, in the order of a training's."""
    throughput = Throughput(batch_size)
    jax.block_until_ready(running := steps.on(next(batches)))
    throughput.begin()
    for _ in range(repeats):
        batch = next_batch(batches, throughput, running)
        following = steps.on(batch)
        jax.block_until_ready(running)
        running = following
        throughput.step()
    jax.block_until_ready(running)
    mesh.barrier("the loop has ended")
    return throughput.figures()
