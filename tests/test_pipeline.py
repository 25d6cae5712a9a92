"""Batches: a function of seed and number, whatever reads them; every test image once."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from absl import flags
from numbered import (
    RECORDS,
    SIZE,
    assert_same,
    encoded,
    evaluate,
    make_record,
    numbers,
    take,
    train,
)

from ccl_jax.data.pipeline import steps_per_epoch
from ccl_jax.data.records import read_image, read_mask

LOPSIDED = [make_record(number, label=int(number >= 38)) for number in range(40)]


def test_a_training_batch_holds_resized_images_and_labels():
    (batch,) = take(train(), 1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "image": (np.uint8, (4, SIZE, SIZE, 3)),
        "label": (np.int32, (4,)),
    }
    for image, label in zip(batch["image"], batch["label"], strict=True):
        record = RECORDS[image[0, 0, 0]]
        np.testing.assert_array_equal(image, read_image(record, SIZE))
        assert label == record.label


def test_every_epoch_holds_every_image_once_in_a_new_order():
    epochs = numbers(take(train(batch_size=1), 33)).reshape(3, 11)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(11), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("shuffle", ["plain", "class_balanced"])
def test_batches_depend_on_the_seed_and_on_nothing_that_reads_them(shuffle):
    want = take(train(shuffle=shuffle, threads=0), 9)
    assert_same(take(train(shuffle=shuffle, threads=3), 9), want)
    assert_same(take(train(shuffle=shuffle, start=4), 5), want[4:])
    assert not np.array_equal(numbers(take(train(shuffle=shuffle, seed=8), 9)), numbers(want))


def test_worker_processes_change_nothing_even_where_nobody_parsed_flags():
    want = take(train(start=2), 5)
    flags.FLAGS.unparse_flags()
    try:
        got = take(train(start=2, workers=2), 5)
        assert_same(got, want)
    finally:
        flags.FLAGS.mark_as_parsed()
    assert type(got[0]["image"]) is np.ndarray


def test_starting_late_does_not_replay():
    began = time.perf_counter()
    take(train(start=10**9), 1)
    assert time.perf_counter() - began < 5


def test_class_balanced_gives_every_class_an_equal_share():
    labels = np.concatenate(
        [b["label"] for b in take(train(LOPSIDED, shuffle="class_balanced", batch_size=40), 20)]
    )
    assert abs(labels.mean() - 0.5) < 0.1  # 800 draws: five standard deviations are 0.09
    plain = np.concatenate([b["label"] for b in take(train(LOPSIDED, batch_size=40), 20)])
    assert plain.mean() == 0.05


def test_class_balanced_reaches_every_image():
    seen = numbers(take(train(LOPSIDED, shuffle="class_balanced", batch_size=40), 20))
    assert set(seen.ravel()) == set(range(40))


def test_steps_per_epoch_drops_a_partial_batch():
    assert [steps_per_epoch(n, 4) for n in (4, 7, 8)] == [1, 1, 2]


@pytest.mark.parametrize("shuffle", ["plain", "class_balanced"])
def test_a_batch_larger_than_the_training_set_is_an_error_with_the_number_to_use(shuffle):
    with pytest.raises(ValueError, match=r"batch_size=16 is more than the 11 .*batch_size=11\."):
        train(shuffle=shuffle, batch_size=16)


def test_one_training_image_makes_batches_of_one():
    assert numbers(take(train(RECORDS[5:6], batch_size=1), 3)).tolist() == [[5]] * 3


def test_a_batch_that_the_processes_cannot_divide_is_an_error():
    message = r"train\.batch_size=4 cannot be split over 3 processes.*--config\.train\.batch_size=6"
    with pytest.raises(ValueError, match=message):
        train(process_count=3)
    with pytest.raises(ValueError, match=r"--config\.eval\.batch_size=8\."):
        evaluate(process_count=8)


def test_an_unknown_shuffle_is_an_error():
    with pytest.raises(ValueError, match=r"config\.data\.shuffle='random'.*class_balanced"):
        train(shuffle="random")


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_evaluation_takes_every_record_once_and_pads_with_nothing(batch_size):
    batches = take(evaluate(batch_size=batch_size), None)
    assert len(batches) == -(-11 // batch_size)
    assert {len(batch["real"]) for batch in batches} == {batch_size}
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    real = joined.pop("real")
    assert real.tolist() == [True] * 11 + [False] * (len(real) - 11)
    np.testing.assert_array_equal(joined["index"][real], np.arange(11))
    np.testing.assert_array_equal(joined.pop("index")[~real], -1)
    assert not any(array[~real].any() for array in joined.values())


def test_an_evaluation_batch_says_what_its_records_say():
    (batch,) = take(evaluate(batch_size=11), None)
    assert {name: array.dtype for name, array in batch.items()} == {
        "image": np.uint8,
        "label": np.int32,
        "mask": np.uint8,
        "anomalous": bool,
        "index": np.int32,
        "real": bool,
    }
    for row, record in enumerate(RECORDS):
        np.testing.assert_array_equal(batch["image"][row], read_image(record, SIZE))
        np.testing.assert_array_equal(batch["mask"][row], read_mask(record, SIZE))
        assert batch["label"][row] == record.label
        assert batch["anomalous"][row] == record.anomalous
    assert batch["mask"].any((1, 2)).tolist() == batch["anomalous"].tolist()


def test_evaluation_of_nothing_has_no_batches():
    assert take(evaluate([]), None) == []


def test_evaluation_by_workers_changes_nothing():
    assert_same(take(evaluate(workers=1), None), take(evaluate(), None))


@pytest.mark.parametrize("reading", [{"threads": 0}, {"threads": 2}, {"workers": 1}], ids=str)
def test_a_bad_file_comes_through_as_its_own_error(tmp_path, reading):
    bad = tmp_path / "bad.png"
    bad.write_text("not a picture")
    records = [*RECORDS[:5], dataclasses.replace(RECORDS[5], image=bad)]
    with evaluate(records, **reading) as batches:
        assert next(batches)["index"].tolist() == [0, 1, 2, 3]
        with pytest.raises(ValueError, match=r"^.*/bad\.png cannot be read .* is empty"):
            next(batches)


def test_a_mask_of_another_size_comes_through_as_its_own_error():
    wrong = dataclasses.replace(RECORDS[0], mask=encoded(np.ones((12, 10), np.uint8)))
    with evaluate([wrong]) as batches, pytest.raises(ValueError, match=r"10x12 .* 12x10"):
        next(batches)


def test_closing_ends_the_threads_and_may_be_repeated():
    batches = train(threads=3)
    next(batches)
    assert any("grain-prefetch" in thread.name for thread in threading.enumerate())
    batches.close()
    batches.close()
    for thread in threading.enumerate():
        if "grain-prefetch" in thread.name:
            thread.join(timeout=5)
    assert not any("grain-prefetch" in thread.name for thread in threading.enumerate())
    assert list(batches) == []
