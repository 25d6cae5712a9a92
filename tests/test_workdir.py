"""One run at a time in a workdir, and a clear word where it cannot be written."""

import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from ccl_jax import follow, mesh, settle
from ccl_jax.data.layouts import Split
from ccl_jax.evaluation_log import EvaluationLog
from ccl_jax.workdir import HOLDER, check_writable, lock_workdir, only_run

HOLD = """
import sys, time
from pathlib import Path
from ccl_jax.workdir import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """A second process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_second_run_in_a_workdir_is_refused_and_told_of_the_first(tmp_path, other_run):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"process {other_run.pid} on .*--workdir=.*-2"):
        lock_workdir(tmp_path).__enter__()
    assert (tmp_path / "config.json").read_text() == "{}"
    assert other_run.poll() is None


def test_lock_vanishes_with_a_killed_run(tmp_path, other_run):
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    assert (tmp_path / HOLDER).exists(), "a killed run cannot clean up, so this test is real"
    with lock_workdir(tmp_path):
        assert str(os.getpid()) in (tmp_path / HOLDER).read_text()


def test_lock_is_free_again_after_the_block_even_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), lock_workdir(tmp_path):
            raise RuntimeError("inside")
    assert not (tmp_path / HOLDER).exists()


def test_refusal_before_the_other_run_has_written_who_it_is(tmp_path, other_run):
    (tmp_path / HOLDER).unlink()
    with pytest.raises(ValueError, match="in use by another run"):
        lock_workdir(tmp_path).__enter__()


def test_refusal_comes_at_once(tmp_path, other_run):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="in use"):
        lock_workdir(tmp_path).__enter__()
    assert time.perf_counter() - start < 1.0


def test_writable_workdir_is_created_and_left_empty(tmp_path):
    workdir = tmp_path / "new" / "run"
    check_writable(workdir)
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("workdir", ["file", "file/below", "/proc/run", "/proc"])
def test_unwritable_workdir_is_named_with_the_reason(tmp_path, workdir):
    (tmp_path / "file").write_text("")  # tests may run as root, whom no permission stops
    with pytest.raises(ValueError, match=r"--workdir=.* cannot be written \(.+\); choose another"):
        check_writable(tmp_path / workdir)
    with pytest.raises(ValueError, match="cannot be written"):
        lock_workdir(tmp_path / workdir).__enter__()


def test_every_start_of_a_run_has_another_number(tmp_path):
    numbers = []
    for _ in range(2):
        with only_run(tmp_path) as run:
            numbers.append(run)
    assert 0 < numbers[0] < numbers[1]


def test_where_the_first_process_is_refused_all_are_and_none_writes(
    tmp_path, other_run, monkeypatch
):
    before = sorted(tmp_path.iterdir())
    sent = []
    monkeypatch.setattr(mesh, "from_first", lambda number: sent.append(number) or sent[0])
    with pytest.raises(ValueError, match="in use by another run"), only_run(tmp_path):
        pass
    monkeypatch.setattr(mesh, "is_first", lambda: False)
    with pytest.raises(ValueError, match="refused to the first process"), only_run(tmp_path):
        pass
    assert sent[0] == 0
    assert sorted(tmp_path.iterdir()) == before


def test_the_other_processes_take_the_number_of_the_first_and_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "from_first", lambda number: 5)
    monkeypatch.setattr(mesh, "is_first", lambda: False)
    with only_run(tmp_path) as run:
        assert run == 5 and not list(tmp_path.iterdir())


def evaluated(workdir, step):
    folder = workdir / f"evaluation/{step}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")


def test_a_fresh_training_puts_the_evaluations_of_the_one_before_aside(
    tiny_config, tmp_path, capsys
):
    def settle_workdir(fresh):
        settle.settle_workdir(tiny_config, tmp_path, Split([], [], []), fresh=fresh)
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    with EvaluationLog(tmp_path / follow.LOG, tensorboard=False):
        assert settle_workdir(fresh=True) == [follow.LOG], "a follower waits there"
        evaluated(tmp_path, 2)
    assert settle_workdir(fresh=False) == ["evaluation", follow.LOG]
    assert settle_workdir(fresh=True) == ["evaluation-old", "log-evaluation-old"]
    assert f"moved to {tmp_path / 'evaluation-old'}" in capsys.readouterr().out
    evaluated(tmp_path, 3)
    settle_workdir(fresh=True)
    assert (tmp_path / "evaluation-old-2/3/results.json").exists()
    assert (tmp_path / "evaluation-old/2/results.json").exists()


def test_a_follower_of_a_training_that_is_no_more_is_to_be_stopped_first(tmp_path):
    with EvaluationLog(tmp_path / follow.LOG, tensorboard=False) as log:
        log.write(2, {"image_auroc": 0.5})
    with (
        FileLock(tmp_path / follow.LOG / follow.LOCK),
        pytest.raises(ValueError, match=r"evaluator still follows\. Stop it first"),
    ):
        settle.put_evaluations_aside(tmp_path)
    assert (tmp_path / follow.LOG).exists()
