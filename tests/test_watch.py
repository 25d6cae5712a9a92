"""A process that waits for ever ends, and names the one that holds all up."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from ccl_jax.watch import FAILED, FOLDER, INTERVAL, PATIENT, STALLED, Watch
from ccl_jax.whereabouts import FIRST, Report, report_of


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Run:
    """Processes of one run, in one process and by a clock of their own: their threads' ticks."""

    def __init__(self, folder, count, limit=80.0):
        self.folder, self.clock, self.ended = folder / FOLDER, Clock(), []
        self.watches = [
            Watch(
                folder,
                index=index,
                count=count,
                stall_seconds=limit,
                end=lambda status, index=index: self.ended.append((index, status)),
                clock=self.clock,
            )
            for index in range(count)
        ]
        self.folder.mkdir(exist_ok=True)
        for watch in self.watches:
            watch._write()
            watch._since = 0.0

    def goes_on(self, seconds, *indices):
        """Time passes; the threads of these processes, or of all, report."""
        for _ in range(round(seconds / INTERVAL)):
            self.clock.now += INTERVAL
            for index in indices or range(len(self.watches)):
                self.watches[index].tick()


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return lambda count, **options: Run(tmp_path, count, **options)


def test_every_process_says_where_it_is(run_of):
    run = run_of(2)
    run.watches[1].at("waiting for input", 7)
    run.goes_on(INTERVAL)
    report = json.loads((run.folder / "1.json").read_text())
    assert (report["phase"], report["step"]) == ("waiting for input", 7)
    assert (report["host"], report["pid"]) == (socket.gethostname(), os.getpid())


def test_a_process_without_progress_ends_and_one_with_progress_does_not(run_of, capsys):
    run = run_of(1)
    for step in range(40):
        run.watches[0].at("computing", step)
        run.goes_on(10)
    assert run.ended == []
    run.goes_on(70)
    assert run.ended == []
    run.goes_on(10 + INTERVAL)
    assert run.ended[0] == (0, STALLED)
    err = capsys.readouterr().err
    assert "nothing has gone on for 80 s; this process is computing, step 39." in err
    assert "status 70 (config.run.stall_seconds=80)" in err and "--workdir" in err


@pytest.mark.parametrize(
    ("limit", "phase"), [(0.0, "computing"), (80.0, "compiling"), (80.0, FIRST)]
)
def test_no_end_where_it_is_switched_off_and_later_where_things_take_long(run_of, limit, phase):
    run = run_of(1, limit=limit)
    run.watches[0].at(phase)
    run.goes_on(80 * PATIENT["compiling"] - INTERVAL)
    assert run.ended == []
    run.goes_on(10)
    assert bool(run.ended) == (limit > 0)


def test_a_process_that_was_stopped_and_continued_has_not_stalled(run_of):
    run = run_of(1)
    run.watches[0].at("computing", 1)
    run.goes_on(INTERVAL)
    run.clock.now += 1e5  # Ctrl-Z, or a laptop that sleeps
    run.goes_on(INTERVAL)
    assert run.ended == []


def test_batches_of_an_evaluation_are_progress(run_of):
    run = run_of(1)
    checked = []
    with run.watches[0].during("evaluating", 3):
        for _ in run.watches[0].over(lambda: checked.append(1))([{}] * 30):
            run.goes_on(60)
    assert run.ended == [] and len(checked) == 30
    run.goes_on(60)
    assert run.watches[0]._place == ("starting", None)


def test_a_stopped_process_is_named_early_and_when_the_others_end(run_of, capsys):
    run = run_of(3)
    for watch in run.watches:
        watch.at("computing", 5)
    run.goes_on(INTERVAL)
    run.goes_on(40, 0, 1)  # 2 gives no sign of life
    name = f"process 2 (pid {os.getpid()} on {socket.gethostname()})"
    err = capsys.readouterr().err
    assert err.count(f"{name} gives no sign of life; it was computing, step 5.") == 2
    assert run.ended == []
    run.goes_on(40, 0, 1)
    assert set(run.ended) == {(0, STALLED), (1, STALLED)}
    assert f"waits for {name}, which was computing, step 5: stopped or lost" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("phase", ["waiting for input", "saving"])
def test_the_process_that_the_others_wait_for_is_named_and_where_it_is(run_of, capsys, phase):
    run = run_of(3)
    for watch, place in zip(run.watches, ["computing", "computing", phase], strict=True):
        watch.at(place, 5)
    run.goes_on(80 + INTERVAL)  # it sees the last move at its next report
    err = capsys.readouterr().err
    name = f"process 2 (pid {os.getpid()} on {socket.gethostname()})"
    assert f"What holds all up is {name}, {phase}, step 5." in err
    assert f"this process is {phase}, step 5. What holds all up is this process." in err


def test_the_first_steps_wait_for_others_that_still_compile(run_of, capsys):
    run = run_of(2)
    run.watches[0].at(FIRST, 1)
    run.watches[1].at("compiling")
    run.goes_on(80 * 6 - INTERVAL)
    assert run.ended == []
    run.goes_on(2 * INTERVAL)
    assert "What holds all up is process 1" in capsys.readouterr().err


def test_a_process_that_is_behind_is_named(run_of, capsys):
    run = run_of(2)
    run.watches[0].at("computing", 6)
    run.watches[1].at("computing", 5)
    run.goes_on(80 + INTERVAL)  # it sees the last move at its next report
    assert "What holds all up is process 1" in capsys.readouterr().err


def test_where_all_wait_in_the_same_step_no_process_is_accused(run_of, capsys):
    run = run_of(2)
    for watch in run.watches:
        watch.at("computing", 5)
    run.goes_on(80 + INTERVAL)  # it sees the last move at its next report
    assert "so are all others: devices or the network between them hang" in capsys.readouterr().err


def test_a_process_that_never_began_is_named(run_of, capsys):
    run = run_of(2)
    (run.folder / "1.json").unlink()
    run.watches[0].at("computing", 1)
    run.goes_on(80 + INTERVAL, 0)
    assert "process 1, which has not begun" in capsys.readouterr().err


def test_an_error_of_one_process_ends_the_others_with_its_name_and_words(run_of, capsys):
    run = run_of(3)
    with pytest.raises(ValueError, match="cut off"), run.watches[1]:
        raise ValueError("a.png is cut off")
    report = json.loads((run.folder / FAILED).read_text())
    assert report["index"] == 1 and report["error"] == "ValueError: a.png is cut off"
    run.goes_on(INTERVAL)
    assert set(run.ended) == {(0, STALLED), (2, STALLED)}
    name = f"process 1 (pid {os.getpid()} on {socket.gethostname()})"
    assert f"{name} ended with an error: ValueError: a.png is cut off" in capsys.readouterr().err


def test_an_error_of_an_earlier_start_ends_nobody(run_of, tmp_path):
    run = run_of(2)
    dataclasses.replace(report_of(1, "computing", 1, 1), error="old").write(run.folder / FAILED)
    run.watches[0]._since = (run.folder / FAILED).stat().st_mtime + 1
    run.goes_on(INTERVAL, 0)
    assert run.ended == []


GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:26505"


def test_a_failed_collective_names_the_process_of_this_host_that_is_gone(run_of, capsys):
    run = run_of(2)
    process = subprocess.Popen([sys.executable, "-c", ""])
    report = dataclasses.replace(report_of(1, "computing", 4, 1), pid=process.pid)
    report.write(run.folder / "1.json")
    while not report.is_dead_here:
        time.monotonic()  # a zombie, until somebody waits for it
    process.wait()
    assert report.is_dead_here
    with pytest.raises(ValueError), run.watches[0]:
        raise ValueError(GLOO)
    assert run.ended == [(0, STALLED)]
    err = capsys.readouterr().err
    assert f"lost process 1 (pid {process.pid} on {socket.gethostname()}), which was comp" in err


def test_a_failed_collective_names_the_process_of_another_host_that_is_silent(
    run_of, monkeypatch, capsys
):
    run = run_of(3)
    monkeypatch.setattr(time, "sleep", lambda _: run.goes_on(INTERVAL, 0, 1))
    monkeypatch.setattr(Report, "is_dead_here", False)
    with pytest.raises(ValueError), run.watches[1]:
        raise ValueError(GLOO)
    assert run.ended == [(1, STALLED)]
    assert "lost process 2" in capsys.readouterr().err


def test_a_process_that_ends_as_it_should_leaves_no_report(tmp_path):
    with Watch(tmp_path, index=0, count=1, stall_seconds=0.0):
        assert (tmp_path / FOLDER / "0.json").exists()
    assert list((tmp_path / FOLDER).iterdir()) == []
