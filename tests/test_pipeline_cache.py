"""Images kept in memory change no batch, and memory ends growing once they are all there."""

import gc
import multiprocessing
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numbered import (
    RECORDS,
    SIZE,
    CountedRecords,
    assert_same,
    evaluate,
    make_record,
    take,
    train,
)

from ccl_jax.data.pictures import DecodedCache, decoded_bytes

ROOM = decoded_bytes(len(RECORDS), SIZE, masks=True)


@pytest.fixture
def counted(monkeypatch):
    """The records, which note what of them is decoded."""
    return CountedRecords(RECORDS, monkeypatch)


@pytest.mark.parametrize("shuffle", ["plain", "class_balanced"])
@pytest.mark.parametrize("threads", [0, 3])
def test_training_batches_are_the_same_with_and_without_a_cache(shuffle, threads):
    want = take(train(shuffle=shuffle, threads=0), 20)  # seven epochs
    assert_same(take(train(shuffle=shuffle, threads=threads, cache=DecodedCache(ROOM)), 20), want)


def test_every_training_image_is_decoded_once_in_all_epochs(counted):
    cache = DecodedCache(ROOM)
    take(train(counted, threads=0, cache=cache), 20)
    take(train(counted, threads=0, cache=cache, start=5), 20)  # finds them there
    assert sorted(counted.images) == sorted(record.key for record in RECORDS)


def test_a_set_that_does_not_fit_is_read_anew(counted):
    cache = DecodedCache(decoded_bytes(len(RECORDS), SIZE) - 1)
    take(train(counted, threads=0, cache=cache), 20)
    assert len(counted.images) == 20 * 4


def test_kept_images_are_read_by_threads_whatever_the_number_of_workers(counted):
    with train(counted, workers=2, cache=DecodedCache(ROOM)) as batches:
        next(batches)
        assert multiprocessing.active_children() == []
    assert len(counted.images) >= 4


def test_images_that_do_not_fit_are_read_by_workers(counted):
    with train(counted, workers=1, cache=DecodedCache(0)) as batches:
        got = next(batches)
        assert len(multiprocessing.active_children()) == 1
    assert counted.images == []
    assert_same([got], take(train(threads=0), 1))


def test_evaluations_after_the_first_decode_nothing_and_give_the_same(counted):
    cache = DecodedCache(ROOM)
    want = take(evaluate(), None)
    for batch_size in (4, 4, 11):
        got = take(evaluate(counted, cache=cache, batch_size=batch_size), None)
        assert sorted(counted.images) == sorted(record.key for record in RECORDS)
        assert sorted(counted.masks) == sorted(counted.images)
        if batch_size == 4:
            assert_same(got, want)


def test_writing_into_a_batch_leaves_the_kept_images_alone():
    cache = DecodedCache(2 * ROOM)
    for make in (train, evaluate):
        want = take(make(), 3)
        for batch in take(make(cache=cache), 3):
            batch["image"][:] = 99
        assert_same(take(make(cache=cache), 3), want)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_memory_is_flat_over_many_epochs(budget):
    records = [make_record(number) for number in range(8)]
    batches = train(records, image_size=64, batch_size=4, cache=DecodedCache(budget))
    with batches:
        tracemalloc.start()
        try:
            sizes = []
            for _ in range(3):
                for _ in range(24):  # 12 epochs, 1 MB of images
                    next(batches)
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert sizes[2] - sizes[1] < 500_000, sizes  # some batches of 50 kB may be on their way


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_flat_over_many_epochs_of_a_worker():
    def resident():
        children = [child.pid for child in multiprocessing.active_children()]
        pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in ["self", *children]]
        return sum(map(int, pages)) * 4096

    records = [make_record(number) for number in range(8)]
    with train(records, image_size=256, batch_size=4, workers=1, threads=1) as batches:
        sizes = []
        for _ in range(3):
            for _ in range(100):  # 50 epochs, 79 MB of images
                batch = next(batches)
            sizes.append(resident())
    assert batch["image"].shape == (4, 256, 256, 3) and np.unique(batch["image"]).size > 1
    assert sizes[2] - sizes[1] < 30e6, sizes
