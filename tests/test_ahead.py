"""Batches on the devices ahead of the step: same order, same errors, no thread left behind."""

import threading
import time

import jax
import numpy as np
import pytest

from ccl_jax import mesh
from ccl_jax.ahead import Ahead
from ccl_jax.loop import next_batch
from ccl_jax.run_log import RunLog


def batch(number):
    return {"label": np.full(4, number, np.int32)}


class Source:
    """Batches 0, 1, ... up to `stop`, where `error` is raised if there is one."""

    def __init__(self, stop=10**9, error=None, seconds=0.0):
        self.read, self.stop, self.error, self.seconds = 0, stop, error, seconds

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.seconds)
        if self.read >= self.stop:
            raise self.error or StopIteration
        self.read += 1
        return batch(self.read - 1)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def threads():
    return [thread for thread in threading.enumerate() if "batches-ahead" in thread.name]


def test_batches_come_in_order_and_lie_split_over_the_devices():
    where = mesh.make_mesh()
    with Ahead(Source(), where) as ahead:
        for number in range(5):
            got = next(ahead)["label"]
            assert got.sharding == mesh.batch_sharding(where)
            assert got.tolist() == [number] * 4


@pytest.mark.parametrize("depth", [1, 2])
def test_so_many_batches_are_sent_before_they_are_asked_for_and_no_more(depth):
    source = Source()
    with Ahead(source, mesh.make_mesh(1), depth=depth) as ahead:
        for taken in (0, 1, 2):
            wait_until(lambda taken=taken: source.read >= taken + depth)
            time.sleep(0.05)
            assert source.read == taken + depth
            next(ahead)


def test_the_end_of_the_batches_comes_after_the_last_one():
    with Ahead(Source(stop=3), mesh.make_mesh(1)) as ahead:
        assert [int(each["label"][0]) for each in ahead] == [0, 1, 2]
        assert list(ahead) == []


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_error_comes_in_place_of_its_batch_and_is_the_end(good):
    with Ahead(Source(good, ValueError("bad.png")), mesh.make_mesh(1)) as ahead:
        assert [int(next(ahead)["label"][0]) for _ in range(good)] == list(range(good))
        with pytest.raises(ValueError, match=r"^bad\.png$"):
            next(ahead)
        assert list(ahead) == []


def test_rows_that_the_devices_cannot_split_are_an_error_too():
    with (
        Ahead(iter([{"label": np.zeros(3, np.int32)}]), mesh.make_mesh(2)) as ahead,
        pytest.raises(ValueError, match="3"),
    ):
        next(ahead)


def test_closing_waits_for_one_batch_at_most_and_ends_the_thread():
    source = Source(seconds=0.3)
    with Ahead(source, mesh.make_mesh(1), depth=100):
        wait_until(lambda: len(threads()) == 1)
        began = time.monotonic()
    assert time.monotonic() - began < 3  # not thirty
    assert threads() == []
    read = source.read
    time.sleep(0.5)
    assert source.read == read <= 2


def open_log(folder):
    return RunLog(
        folder,
        total_steps=9,
        start_step=0,
        images_per_step=4,
        tensorboard=False,
        progress=False,
    )


def test_waiting_is_counted_only_where_the_step_waits(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(RunLog, "waited", lambda self, seconds: waited.append(seconds))
    with (
        open_log(tmp_path) as log,
        Ahead(Source(seconds=0.2), mesh.make_mesh(1)) as ahead,
    ):
        for _ in range(3):
            time.sleep(0.6)  # a step that computes for longer than a batch takes to come
            jax.block_until_ready(next_batch(ahead, log, {}))
        assert sum(waited) < 0.2
        waited.clear()
        for _ in range(6):
            next_batch(ahead, log, {})
        assert sum(waited) > 0.5  # two were there, four took 0.2 s each


def test_no_device_waits_for_a_batch_while_it_computes(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(RunLog, "waited", lambda self, seconds: waited.append(seconds))
    left = []
    monkeypatch.setattr(jax, "block_until_ready", lambda _: time.sleep(left[-1]))
    with (
        open_log(tmp_path) as log,
        Ahead(Source(seconds=0.4), mesh.make_mesh(1)) as ahead,
    ):
        left.append(0.6)  # seconds, longer than a batch takes
        for _ in range(4):
            next_batch(ahead, log, {})
        assert sum(waited) < 0.3
        left.append(0.2)  # half as long: half of the time is waited for
        for _ in range(4):
            next_batch(ahead, log, {})
        assert 0.4 < sum(waited) < 1.3
