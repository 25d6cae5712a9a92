"""Batches on the devices ahead of the step: same order, same errors, no thread left behind."""

import threading
import time

import jax
import numpy as np
import pytest

from ccl_jax import loop, mesh
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


class Gated(Source):
    """A source in which every batch has to be let through."""

    def __init__(self):
        super().__init__()
        self.asked, self._gate = 0, threading.Semaphore(0)

    def let(self, count):
        self._gate.release(count)

    def __next__(self):
        self.asked += 1
        assert self._gate.acquire(timeout=60)
        return super().__next__()


def test_closing_waits_for_one_batch_at_most_and_ends_the_thread(monkeypatch):
    source = Gated()
    with Ahead(source, mesh.make_mesh(1), depth=100) as ahead:
        wait_until(lambda: source.asked == 1)
        end = ahead._thread.shutdown
        monkeypatch.setattr(ahead._thread, "shutdown", lambda: (source.let(100), end()))
    assert threads() == []
    assert source.asked == source.read == 1  # not a hundred


def test_a_batch_is_ready_once_it_is_there():
    source = Gated()
    with Ahead(source, mesh.make_mesh(1)) as ahead:
        wait_until(lambda: source.asked == 1)
        assert not ahead.ready()
        source.let(1)
        wait_until(ahead.ready)
        next(ahead)
        assert not ahead.ready()
        source.let(2)


class Coming:
    """Batches of which each takes `seconds` of a clock, from when the one before was taken."""

    def __init__(self, seconds):
        self.seconds, self.now, self.there = seconds, 0.0, seconds

    def perf_counter(self):
        return self.now

    def ready(self):
        return self.now >= self.there

    def __next__(self):
        self.now = max(self.now, self.there)
        self.there = self.now + self.seconds
        return {"label": jax.numpy.zeros(4)}


def open_log(folder):
    return RunLog(
        folder,
        total_steps=9,
        start_step=0,
        images_per_step=4,
        tensorboard=False,
        progress=False,
    )


@pytest.mark.parametrize(
    ("step", "waited"),
    [(0.6, 0.0), (0.4, 0.0), (0.3, 0.1), (0.0, 0.4)],  # a batch takes 0.4 s
)
def test_no_device_waits_for_a_batch_while_it_computes(tmp_path, monkeypatch, step, waited):
    counted = []
    monkeypatch.setattr(RunLog, "waited", lambda self, seconds: counted.append(seconds))
    coming = Coming(0.4)
    monkeypatch.setattr(loop, "time", coming)

    def compute(running):
        coming.now += step

    monkeypatch.setattr(jax, "block_until_ready", compute)
    with open_log(tmp_path) as log:
        for _ in range(4):
            next_batch(coming, log, {})
    assert counted == pytest.approx([waited] * 4)


def test_a_batch_that_is_there_is_taken_while_the_step_computes(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(RunLog, "waited", lambda self, seconds: counted.append(seconds))
    coming = Coming(0.4)
    monkeypatch.setattr(loop, "time", coming)
    monkeypatch.setattr(jax, "block_until_ready", lambda running: pytest.fail("waited for it"))
    with open_log(tmp_path) as log:
        coming.now = 0.4
        next_batch(coming, log, {})
    assert counted == [0.0]
