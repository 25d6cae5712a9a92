"""A process that waits for ever ends, and names the one that holds all up."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ccl_jax import ending
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.ending import FAILED_TOO, STALLED, tell
from ccl_jax.mesh import check_divisible
from ccl_jax.watch import FAILED, FOLDER, INTERVAL, LATE, PATIENT, Watch
from ccl_jax.whereabouts import FIRST, Report, report_of

THIS = 7  # start of the run


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
                run=THIS,
                end=lambda status, index=index: self.ended.append((index, status)),
                clock=self.clock,
            )
            for index in range(count)
        ]
        self.folder.mkdir(exist_ok=True)
        for watch in self.watches:
            watch._write()

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
    assert set(run.ended) == {(0, FAILED_TOO), (2, FAILED_TOO)}
    name = f"process 1 (pid {os.getpid()} on {socket.gethostname()})"
    assert f"{name} ended with an error: ValueError: a.png is cut off" in capsys.readouterr().err


def test_what_another_start_of_the_run_has_left_does_not_count(run_of, capsys):
    run = run_of(2)
    old = report_of(1, "computing", 1, 1, run=THIS - 1)
    dataclasses.replace(old, error="old").write(run.folder / FAILED)
    old.write(run.folder / "1.json")
    run.goes_on(INTERVAL, 0)
    assert run.ended == []
    run.goes_on(80 * PATIENT["starting"], 0)
    assert "process 1, which has not begun" in capsys.readouterr().err
    with pytest.raises(ValueError), run.watches[1]:
        raise ValueError("new")
    assert json.loads((run.folder / FAILED).read_text())["run"] == THIS


@pytest.mark.parametrize("spoilt", ["", "{", "[1]", '{"index": 0}', None])
def test_a_file_that_cannot_be_read_is_no_end_of_the_watch(run_of, spoilt):
    run = run_of(2)
    for name in ("1.json", FAILED):
        (run.folder / name).unlink(missing_ok=True)
        if spoilt is None:
            (run.folder / name).mkdir()  # IsADirectoryError, an OSError as ESTALE is
        else:
            (run.folder / name).write_text(spoilt)
    run.watches[0].at("computing", 1)
    run.goes_on(80 + INTERVAL, 0)
    assert (0, STALLED) in run.ended


def test_a_process_ends_too_where_the_first_thread_hangs_at_a_file(run_of, capsys):
    run = run_of(1)
    run.watches[0].at("computing", 1)
    for _ in range(round((80 + LATE * INTERVAL) / INTERVAL)):
        assert run.ended == []
        run.clock.now += INTERVAL
        run.watches[0].tick_without_files()
    run.clock.now += INTERVAL
    run.watches[0].tick_without_files()
    assert run.ended == [(0, STALLED)]
    assert "this process is computing, step 1" in capsys.readouterr().err


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [Closed(), None])
def test_a_process_that_can_tell_nobody_ends_all_the_same(run_of, monkeypatch, stream):
    run = run_of(1)
    monkeypatch.setattr(sys, "stderr", stream)
    run.watches[0].at("computing", 1)
    run.goes_on(80 + INTERVAL)
    assert run.ended[0] == (0, STALLED)


def test_words_that_nobody_takes_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(ending, "_PATIENCE", 0.01)
    taken = threading.Event()

    class Hangs(io.StringIO):
        def write(self, text):
            return int(taken.wait(60))

    monkeypatch.setattr(sys, "stderr", Hangs())
    tell("last words")
    assert not taken.is_set()
    taken.set()


GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:26505"


def test_a_failed_collective_names_the_process_of_this_host_that_is_gone(run_of, capsys):
    run = run_of(2)
    process = subprocess.Popen([sys.executable, "-c", ""])
    report = dataclasses.replace(report_of(1, "computing", 4, 1, run=THIS), pid=process.pid)
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


def test_a_failed_collective_without_a_culprit_is_worth_another_start(run_of, monkeypatch, capsys):
    run = run_of(3)
    monkeypatch.setattr(time, "sleep", lambda _: run.goes_on(INTERVAL))
    monkeypatch.setattr(Report, "is_dead_here", False)
    with pytest.raises(ValueError), run.watches[1]:
        raise ValueError(GLOO)
    assert run.ended == [(1, STALLED)] and not (run.folder / FAILED).exists()
    assert "no process is gone: the network has a fault" in capsys.readouterr().err


def test_a_failed_collective_after_an_error_of_another_process_is_that_error(run_of, capsys):
    run = run_of(2)
    with pytest.raises(ValueError), run.watches[1]:
        raise ValueError("a.png is cut off")
    with pytest.raises(ValueError), run.watches[0]:
        raise ValueError(GLOO)
    assert run.ended == [(0, FAILED_TOO)]
    assert "ended with an error: ValueError: a.png is cut off" in capsys.readouterr().err


def test_our_own_error_that_speaks_of_a_barrier_is_none_of_a_collective(run_of):
    run = run_of(2)
    with pytest.raises(ValueError, match="barrier"), run.watches[1]:
        check_divisible(3, 2, "barrier")
    assert json.loads((run.folder / FAILED).read_text())["index"] == 1


def test_our_own_error_that_comes_from_a_collective_is_one(run_of, tmp_path, monkeypatch):
    run = run_of(3)
    monkeypatch.setattr(time, "sleep", lambda _: run.goes_on(INTERVAL))
    monkeypatch.setattr(Report, "is_dead_here", False)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    with (
        pytest.raises(OSError, match="could not be written"),
        run.watches[1],
        checkpoints._write_errors_explained(),
    ):
        raise ValueError(GLOO)
    assert run.ended == [(1, STALLED)] and not (run.folder / FAILED).exists()


def test_a_process_that_ends_as_it_should_leaves_no_report(tmp_path):
    with Watch(tmp_path, index=0, count=1, stall_seconds=0.0):
        assert (tmp_path / FOLDER / "0.json").exists()
    assert list((tmp_path / FOLDER).iterdir()) == []
