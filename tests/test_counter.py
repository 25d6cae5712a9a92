"""Counts of one device, of several, and beyond 32 bits: the same whole numbers."""

import jax
import numpy as np
import pytest
from test_counts import counted, images, same

from ccl_jax import mesh
from ccl_jax.metrics import counter, counts

LABELS, USED = np.arange(8, dtype=np.int32) % 3, np.arange(8) != 5
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def put(where):
    """Eight images on the devices, and how many regions their masks have."""
    maps, masks, weights, regions = images()
    names = ("maps", "masks", "weights", "labels", "used")
    batch = dict(zip(names, (maps, masks, weights, LABELS, USED), strict=True))
    return mesh.put_batch(batch, where).values(), regions


def alone(times):
    """What one device counts in as many passes over the eight images."""
    maps, masks, weights, _ = images()
    totals = counts.empty_totals(3)
    for _ in range(times):
        once = counted(maps, masks, weights, LABELS, classes=3, use=USED)
        for into, more in zip(totals, once, strict=True):
            into += more
    return totals


@pytest.mark.parametrize(("devices", "shards"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_several_devices_count_what_one_device_counts(devices, shards):
    where = mesh.make_mesh(devices, shards)
    batch, regions = put(where)
    count = counter.Counter(3, where)
    for _ in range(2):
        count.add(*batch, regions=regions)
    totals = count.totals()
    assert same(totals, alone(2))
    assert [leaf.dtype for leaf in totals] == [np.int64, np.int64, np.uint64, np.int64]


def test_counting_sends_no_message_between_devices():
    where = mesh.make_mesh(4)
    batch, _ = put(where)
    compiled = counter._add_on_devices.lower(
        counter.Counter(3, where)._partial, *batch, where=where
    ).compile()
    assert not [name for name in COLLECTIVES if name in compiled.as_text()]
    assert "scatter" in compiled.as_text(), "the text is of another program"


@pytest.mark.parametrize("limits", [{"most_pixels": 2 * 48 * 48}, {"most_regions": 8}])
def test_partial_counts_go_to_the_totals_before_they_could_overflow(limits, monkeypatch):
    flushes = []
    flush = counter.Counter._flush
    monkeypatch.setattr(
        counter.Counter, "_flush", lambda self: (flushes.append(self._pixels), flush(self))
    )
    where = mesh.make_mesh(4)
    batch, regions = put(where)
    count = counter.Counter(3, where, **limits)
    for _ in range(3):
        count.add(*batch, regions=regions)
    assert len(flushes) == 2 and 0 < max(flushes) <= 2 * 48 * 48
    assert same(count.totals(), alone(3))


def test_totals_go_on_beyond_what_a_device_can_count():
    part = jax.device_get(counts.empty_counts(1))
    high, low = part.region
    part = part._replace(
        normal=np.full_like(part.normal, 2**31 - 1),
        region=(np.full_like(high, 2**32 - 1), np.full_like(low, 2**20 - 1)),
    )
    totals = counts.empty_totals(1)
    for _ in range(4):
        counts.add_to_totals(totals, part)
    assert totals.normal[0, 0] == 4 * (2**31 - 1)
    assert int(totals.region[0, 0]) == 4 * (2**52 - 1)
    region = counts.class_counts(totals, ["a"])["a"].region[0]
    assert region == 4 * (2**52 - 1) / 2**35
