"""Unreadable files in training: the first stops it, or each is replaced, counted and named."""

import numpy as np
import pytest
from numbered import RECORDS, assert_same, damaged, evaluate, joined, numbers, take, train

from ccl_jax.data.pictures import DecodedCache

BAD = (4, 8, 10)  # class 1 is 1 4 7 10, class 2 is 2 5 8
STANDS_IN = {4: 7, 8: 2, 10: 1}
SPOILT = damaged(RECORDS, *BAD)


def skipping(**changes):
    told = []
    return train(SPOILT, bad_files="skip", report=told.append, **changes), told


def test_training_stops_at_the_first_bad_file_unless_told_otherwise():
    with train(SPOILT, threads=0) as batches, pytest.raises(ValueError, match=r"bad_files=skip"):
        for _ in range(3):
            next(batches)


@pytest.mark.parametrize("shuffle", ["plain", "class_balanced"])
def test_only_the_rows_of_bad_files_change_and_by_a_rule(shuffle):
    want = numbers(take(train(shuffle=shuffle), 12))
    batches, _ = skipping(shuffle=shuffle, threads=0)
    got = take(batches, 12)
    np.testing.assert_array_equal(numbers(got), np.vectorize(lambda n: STANDS_IN.get(n, n))(want))
    labels = [batch["label"] for batch in take(train(shuffle=shuffle), 12)]
    np.testing.assert_array_equal(np.stack([batch["label"] for batch in got]), labels)


@pytest.mark.parametrize(
    "reading",
    [{"threads": 3}, {"workers": 2}, {"cache": DecodedCache(2**20)}, {"start": 3}],
    ids=["threads", "workers", "cache", "later"],
)
def test_a_batch_with_stand_ins_depends_on_nothing_that_reads_it(reading):
    want = take(skipping(threads=0)[0], 9)[reading.get("start", 0) :]
    batches, told = skipping(**reading)
    assert_same(take(batches, len(want)), want)
    assert sorted(batches.unreadable) == list(BAD)
    assert sorted(reason.split(" cannot")[0] for reason in told) == ["made/10", "made/4", "made/8"]


def test_the_union_of_the_hosts_is_the_batch_of_one_with_stand_ins_too():
    shares = [take(skipping(process_index=i, process_count=2)[0], 9) for i in range(2)]
    assert_same(joined(shares), take(skipping()[0], 9))


def test_a_bad_file_is_told_when_it_is_its_turn_and_once():
    order = numbers(take(train(threads=0), 12))
    batches, told = skipping(threads=0)
    with batches:
        for row in order:
            before = len(told)
            next(batches)
            new = [reason.split(" cannot")[0] for reason in told[before:]]
            # A stand-in that is bad itself is met before its turn; here none is.
            assert set(new) <= {f"made/{number}" for number in row}
    assert len(told) == 3


def test_a_class_without_a_readable_image_stops_a_worker_too():
    records = damaged(RECORDS, 1, 4, 7, 10)
    for workers in (0, 1):
        with (
            train(records, bad_files="skip", workers=workers, report=list) as batches,
            pytest.raises(ValueError, match="none of the 4 training images of made/class1"),
        ):
            for _ in range(3):
                next(batches)


def test_an_evaluation_stops_at_a_bad_file_for_every_image_counts():
    with evaluate(SPOILT) as batches:
        assert next(batches)["index"].tolist() == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="made/4 cannot be read"):
            next(batches)
