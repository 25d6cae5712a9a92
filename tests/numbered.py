"""Records whose pictures show their number, and what tests do with batches of them."""

import dataclasses
import io
import itertools

import numpy as np
from PIL import Image

from ccl_jax.data import pictures, pipeline
from ccl_jax.data.records import Record, read_image, read_mask

SIZE = 8


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_record(number, label=0):
    """A record whose picture is `number` everywhere; every third one is a defect with a mask."""
    mask = np.zeros((10, 12), np.uint8)
    mask[:5] = 1
    anomalous = number % 3 == 0
    return Record(
        image=encoded(np.full((10, 12, 3), number, np.uint8)),
        mask=encoded(mask) if anomalous else None,
        dataset="made",
        class_name=f"class{label}",
        label=label,
        anomalous=anomalous,
        key=f"made/{number}",
    )


RECORDS = [make_record(number, label=number % 3) for number in range(11)]


def damaged(records, *bad):
    """The records, those at the given indices with an image that cannot be read."""
    return [
        dataclasses.replace(record, image=b"not a picture") if index in bad else record
        for index, record in enumerate(records)
    ]


class CountedRecords(list):
    """Copies of records that note the keys of those whose images and masks this process decodes.

    Only of these copies: a thread of an iterator that was closed may still be reading others.
    """

    def __init__(self, records, monkeypatch):
        super().__init__(dataclasses.replace(record) for record in records)
        self.images, self.masks = [], []

        def noting(keys, read):
            def wrapped(record, size):
                if any(record is mine for mine in self):
                    keys.append(record.key)
                return read(record, size)

            return wrapped

        monkeypatch.setattr(pictures, "read_image", noting(self.images, read_image))
        monkeypatch.setattr(pictures, "read_mask", noting(self.masks, read_mask))


def train(records=RECORDS, **changes):
    settings = {"image_size": SIZE, "batch_size": 4, "seed": 7, "shuffle": "plain"}
    settings |= {"threads": 2, "workers": 0}
    return pipeline.train_batches(records, **settings | changes)


def evaluate(records=RECORDS, **changes):
    settings = {"image_size": SIZE, "batch_size": 4, "threads": 2, "workers": 0}
    return pipeline.evaluation_batches(records, **settings | changes)


def take(batches, number):
    with batches:
        return list(itertools.islice(batches, number))


def numbers(batches):
    """The record numbers in the pictures, one row a batch."""
    return np.stack([batch["image"][:, 0, 0, 0] for batch in batches])


def joined(shares):
    """The global batches of processes that have each a share of their rows."""
    return [
        {name: np.concatenate([share[name] for share in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
