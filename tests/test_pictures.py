"""Decoded images: read once where they fit the budget, replaced by rule where a file is bad."""

import dataclasses
import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numbered import RECORDS, SIZE, CountedRecords, damaged, make_record
from PIL import Image

from ccl_jax.data import pictures as module
from ccl_jax.data import records as records_module
from ccl_jax.data.pictures import (
    DecodedCache,
    Pictures,
    TrainingImages,
    check_pictures,
    decoded_bytes,
)
from ccl_jax.data.records import StoreError, read_image, read_mask

CLASSES = [make_record(number, label=number % 2) for number in range(6)]  # 0 2 4 and 1 3 5


@pytest.mark.parametrize("keep", [False, True])
def test_pictures_are_what_the_readers_return(keep):
    pictures = Pictures(RECORDS, SIZE, masks=True, keep=keep)
    for _ in range(2):
        for index, record in enumerate(RECORDS):
            np.testing.assert_array_equal(pictures.image(index), read_image(record, SIZE))
            np.testing.assert_array_equal(pictures.mask(index), read_mask(record, SIZE))


@pytest.mark.parametrize(("keep", "times"), [(True, 1), (False, 3)])
def test_a_kept_picture_is_read_once_and_another_every_time(monkeypatch, keep, times):
    records = CountedRecords(RECORDS, monkeypatch)
    pictures = Pictures(records, SIZE, masks=True, keep=keep)
    for _ in range(3):
        pictures.image(4)
        pictures.mask(6)
    assert (records.images, records.masks) == (["made/4"] * times, ["made/6"] * times)


def test_threads_that_share_kept_pictures_get_whole_rows(monkeypatch):
    size = 512  # 768 KiB: long enough in the writing to be caught half way

    def slow(record, size):
        time.sleep(0.001)
        return np.full((size, size, 3), 1 + int(record.key.split("/")[1]), np.uint8)

    monkeypatch.setattr(module, "read_image", slow)
    pictures = Pictures(RECORDS, size, keep=True)
    wrong = []
    start = threading.Barrier(8)

    def look():
        start.wait()
        for index in range(len(RECORDS)):
            wrong.extend([index] * int((pictures.image(index) != index + 1).any()))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_fits_is_known_from_numbers_alone():
    assert decoded_bytes(10, 256) == 10 * 256 * 256 * 3 == 1_966_080
    assert decoded_bytes(10, 256, masks=True) == 2_621_440
    exact = decoded_bytes(len(RECORDS), SIZE)
    assert DecodedCache(exact).pictures(RECORDS, SIZE).kept
    assert not DecodedCache(exact - 1).pictures(RECORDS, SIZE).kept
    assert not DecodedCache(0).pictures(RECORDS, SIZE).kept


def test_sets_share_one_budget_and_each_counts_once():
    train, test = RECORDS, CLASSES
    cache = DecodedCache(decoded_bytes(11, SIZE) + decoded_bytes(6, SIZE, masks=True))
    assert cache.pictures(train, SIZE) is cache.pictures(list(train), SIZE)
    assert cache.free == decoded_bytes(6, SIZE, masks=True)
    assert cache.pictures(test, SIZE, masks=True) is cache.pictures(test, SIZE, masks=True)
    assert cache.free == 0
    assert not cache.pictures(test, SIZE).kept  # without masks it is another set
    assert not cache.pictures(train, 2 * SIZE).kept


def stand_ins(records, bad_files="skip"):
    """The number of the record that each index gives, and the indices passed over."""
    images = TrainingImages(Pictures(records, SIZE), bad_files)
    found = [images.image(index) for index in range(len(records))]
    return [int(image[0, 0, 0]) for image, _ in found], [sorted(passed) for _, passed in found]


@pytest.mark.parametrize(
    ("bad", "numbers", "passed"),
    [
        ((), [0, 1, 2, 3, 4, 5], [[], [], [], [], [], []]),
        ((2,), [0, 1, 4, 3, 4, 5], [[], [], [2], [], [], []]),
        ((4,), [0, 1, 2, 3, 0, 5], [[], [], [], [], [4], []]),  # round again
        ((1, 3), [0, 5, 2, 5, 4, 5], [[], [1, 3], [], [3], [], []]),
        ((0, 2, 5), [4, 1, 4, 3, 4, 1], [[0, 2], [], [2], [], [], [5]]),
    ],
)
def test_the_next_readable_image_of_the_class_stands_in(bad, numbers, passed):
    assert stand_ins(damaged(CLASSES, *bad)) == (numbers, passed)


def test_the_reason_of_each_unreadable_image_is_told_every_time(monkeypatch):
    records = CountedRecords(damaged(CLASSES, 1, 3), monkeypatch)
    images = TrainingImages(Pictures(records, SIZE), "skip")
    for _ in range(2):
        _, passed = images.image(1)
        assert [passed[index].split(" cannot")[0] for index in (1, 3)] == ["made/1", "made/3"]
    assert records.images == ["made/1", "made/3", "made/5", "made/5"]  # bad ones only once


def test_a_class_of_which_nothing_can_be_read_stops_in_spite_of_skipping():
    images = TrainingImages(Pictures(damaged(CLASSES, 1, 3, 5), SIZE), "skip")
    assert images.image(0)[1] == {}
    with pytest.raises(ValueError, match=r"none of the 3 training images of made/class1") as error:
        images.image(3)
    assert "made/3 cannot be read as an image" in str(error.value)


def test_stopping_names_the_file_and_the_setting_that_skips_it():
    message = r"^made/2 cannot be read.*--config\.data\.bad_files=skip\.$"
    with pytest.raises(ValueError, match=message):
        stand_ins(damaged(CLASSES, 2), "stop")


def test_only_training_images_that_are_to_stop_a_training_are_checked_before_it():
    train, test = damaged(CLASSES, 2, 3), [make_record(9)]
    with pytest.raises(ValueError, match=r"2 of 6 pictures are bad.*bad_files=skip\.$"):
        check_pictures(train, test, bad_files="stop")
    check_pictures(train, test, bad_files="skip")
    for bad_files in ("stop", "skip"):
        with pytest.raises(ValueError, match=r"made/9 cannot be read.*silently\.$"):
            check_pictures(CLASSES, damaged(test, 0), bad_files=bad_files)


@pytest.mark.parametrize(
    ("error", "skipped"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), True),
        (PermissionError(errno.EACCES, "not yours"), True),
        (OSError("image file is truncated"), True),
        (OSError(errno.EMFILE, "too many open files"), False),
        (OSError(errno.EIO, "input/output error"), False),
        (OSError(errno.ESTALE, "stale file handle"), False),
    ],
)
def test_what_fails_for_one_file_is_skipped_and_what_fails_for_all_stops(
    monkeypatch, error, skipped
):
    def fail(source):
        if source == Path("bad.png"):
            raise error
        return Image.open(source)

    records = [dataclasses.replace(CLASSES[0], image=Path("bad.png")), *CLASSES[1:]]
    monkeypatch.setattr(records_module, "Image", SimpleNamespace(**vars(Image) | {"open": fail}))
    if skipped:
        assert stand_ins(records)[1][0] == [0]
    else:
        for bad_files in ("skip", "stop"):
            with pytest.raises(StoreError, match=r"no fault of the file.*again\.$"):
                stand_ins(records, bad_files)
            with pytest.raises(StoreError, match=r"no fault of the file.*again\.$"):
                check_pictures(records, records, bad_files=bad_files)


def test_a_lack_of_memory_is_no_bad_file(monkeypatch):
    def fail(source):
        raise MemoryError

    monkeypatch.setattr(records_module, "Image", SimpleNamespace(**vars(Image) | {"open": fail}))
    with pytest.raises(MemoryError):
        stand_ins(CLASSES)


def test_an_unknown_way_with_bad_files_is_an_error():
    with pytest.raises(ValueError, match=r"config\.data\.bad_files='ignore'.*bad_files=skip"):
        stand_ins(CLASSES, "ignore")
