"""Batch i follows from the seed and i, whatever reads it; evaluation takes every image once."""

import itertools

import numpy as np
import pytest
from numbered import RECORDS, CountedRecords, assert_same, evaluate, joined, take, train

SHUFFLES = ("plain", "class_balanced")
FOUR = pytest.param(4, marks=pytest.mark.slow)  # processes take seconds to start


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("workers", [1, 2, FOUR])
def test_worker_processes_give_the_batches_of_none(workers, shuffle):
    want = take(train(shuffle=shuffle, threads=0, start=2), 9)  # more than two epochs of 11
    assert_same(take(train(shuffle=shuffle, threads=1, workers=workers, start=2), 9), want)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize(
    ("hosts", "workers"),
    [(1, 0), (2, 0), (3, 0), (4, 0), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_the_union_of_the_hosts_is_the_batch_of_one(hosts, workers, shuffle):
    rows = 2 if hosts > 2 else 4
    settings = {"shuffle": shuffle, "batch_size": hosts * rows, "start": 1}
    shares = [
        take(train(**settings, workers=workers, process_index=i, process_count=hosts), 5)
        for i in range(hosts)
    ]
    assert {len(batch["label"]) for share in shares for batch in share} == {rows}
    assert_same(joined(shares), take(train(**settings, threads=0), 5))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resuming_reads_nothing_before_its_batch(monkeypatch, shuffle, threads):
    records = CountedRecords(RECORDS, monkeypatch)
    got = take(train(records, shuffle=shuffle, start=1000, threads=threads), 3)
    shown = [f"made/{number}" for batch in got for number in batch["image"][:, 0, 0, 0]]
    ahead = threads  # batches that are read while the last is handed over
    assert len(shown) <= len(records.images) <= len(shown) + 4 * ahead
    assert set(shown) <= set(records.images)
    if threads == 0:
        assert records.images == shown


CASES = itertools.product((1, 5, 11), (1, 2, 4, 8, 12, 16), (1, 2, 4))


@pytest.mark.parametrize(
    ("images", "batch_size", "hosts"), [case for case in CASES if case[1] % case[2] == 0]
)
def test_evaluation_covers_every_image_once(images, batch_size, hosts):
    settings = {"batch_size": batch_size, "threads": 0, "process_count": hosts}
    shares = [
        take(evaluate(RECORDS[:images], **settings, process_index=i), None) for i in range(hosts)
    ]
    assert {len(share) for share in shares} == {-(-images // batch_size)}
    whole = joined(shares)
    index, real = (np.concatenate([batch[name] for batch in whole]) for name in ("index", "real"))
    assert index[real].tolist() == list(range(images))
    shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in whole])
    assert shown[real].tolist() == list(range(images))
    assert set(index[~real].tolist()) <= {-1}
